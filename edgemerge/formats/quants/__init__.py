"""Types of weights: codecs, mixtures of them, importance matrices."""
