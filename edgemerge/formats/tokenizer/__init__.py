"""Tokenizers of Hugging Face directories as metadata of GGUF."""
