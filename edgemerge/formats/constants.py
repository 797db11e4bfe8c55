"""Tensors that follow from a model's configuration."""

from __future__ import annotations

__all__ = ["is_constant"]

# Computed from the configuration, not learnt: copied from the base, never merged.
CONSTANTS = ("rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd")


def is_constant(name: str) -> bool:
    """Tell whether a tensor is derived from the configuration rather than learnt."""
    stem = name.rpartition(".")[0]
    return stem.split(".")[-1] in CONSTANTS
