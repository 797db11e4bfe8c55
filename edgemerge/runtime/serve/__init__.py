"""The OpenAI-compatible server: llama-cpp-python's routes behind our gate, queue and models."""
