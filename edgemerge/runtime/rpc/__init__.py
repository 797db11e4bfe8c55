"""One model on several boards: ggml's RPC, where to find its workers, and what happens when one is lost."""
