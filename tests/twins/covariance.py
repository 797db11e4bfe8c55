"""Slow, obviously right NumPy twin of the method covariance: inverses in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.twins.methods import subtract

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def covariance(
    base: Float32,
    models: Sequence[Float32],
    weights: Sequence[float],
    *,
    ridge: float = 0.1,
    columns: float = 256,
    scale: float = 1.0,
) -> Float64:
    """`D = (sum w D_i C_i) (sum w C_i)^-1`, `C_i = D_i' D_i / tr(D_i' D_i) + ridge / n`, by blocks."""
    n = base.shape[-1]
    deltas = [subtract(base, x).astype(np.float64).reshape(-1, n) for x in models]
    if len(deltas[0]) == 1 or not any(map(np.any, deltas)):
        merged = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
        return np.asarray(base + scale * np.reshape(merged, base.shape))
    merged = np.zeros_like(deltas[0])
    width = int(columns) or n
    for start in range(0, n, width):
        own = slice(start, min(start + width, n))
        left = np.zeros_like(merged[:, own])
        right = np.zeros((left.shape[1], left.shape[1]))
        for weight, delta in zip(weights, deltas, strict=True):
            if not np.any(delta):
                continue
            x = delta[:, own]
            c = x.T @ x / np.sum(delta**2) + ridge / n * np.eye(x.shape[1])
            left += weight * x @ c
            right += weight * c
        merged[:, own] = left @ np.linalg.inv(right)
    return np.asarray(base + scale * merged.reshape(base.shape))


TWINS: dict[str, Any] = {"covariance": covariance}
