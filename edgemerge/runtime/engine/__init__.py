"""One engine for all who ask a model: many sequences in one context, in a process of its own."""
