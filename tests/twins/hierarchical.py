"""Slow, obviously right NumPy twin of the hierarchical method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.weighting import factors

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def deltas_of(base: Float32, experts: Sequence[Float32]) -> Float64:
    return np.stack([(x - base).astype(np.float64) for x in experts])


def gram_of(deltas: Float64) -> Float64:
    flat = deltas.reshape(len(deltas), -1)
    return flat @ flat.T


def twin(
    base: Float32,
    experts: Sequence[Float32],
    weighting: str,
    *,
    weights: Sequence[float] | None = None,
    scope: str = "tensor",
    scale: float = 1.0,
    gram: Float64 | None = None,
) -> Float64:
    """`base + lambda * sum_m u_m delta_m`, whole tensors in float64."""
    deltas = deltas_of(base, experts)
    w = np.ones(len(experts)) if weights is None else np.array(weights)
    if scope == "row":
        rows = deltas.reshape(len(deltas), -1, base.shape[-1])
        shares = [factors(gram_of(rows[:, i]), w, weighting) for i in range(rows.shape[1])]
        merged = np.einsum("rm,mri->ri", np.array(shares), rows).reshape(base.shape)
    else:
        shares = factors(gram_of(deltas) if gram is None else gram, w, weighting)
        merged = np.tensordot(shares, deltas, 1)
    return base.astype(np.float64) + scale * merged
