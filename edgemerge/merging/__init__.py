"""Doing what was planned: workers, streams of blocks, kernels compiled before the work."""
