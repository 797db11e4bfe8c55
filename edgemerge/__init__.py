"""Merge fine-tuned language models on the device, inside a memory budget, into one GGUF."""
