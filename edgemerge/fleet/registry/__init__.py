"""A registry that is only files: signed deltas and models, with roles as TUF defines them."""
