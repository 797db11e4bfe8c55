"""GGUF files: headers, metadata, tensors, splits, writing."""
