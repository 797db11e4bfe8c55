"""Hugging Face directories, seen through the eyes of GGUF."""
