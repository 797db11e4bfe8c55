"""Which attention heads and feed-forward neurons of two models belong together."""
