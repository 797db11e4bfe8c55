"""Speed, latency, load time, memory and energy of a model."""
