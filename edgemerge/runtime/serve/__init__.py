"""The OpenAI-compatible server: a gate, a queue, models in processes of their own, and routes."""
