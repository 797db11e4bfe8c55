"""LoRA adapters: PEFT directories and GGUF adapters, and models that have some added."""
