"""Slow, obviously right NumPy twin of merges weighted by importances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def merge_by_importance(
    base: Float32,
    experts: Sequence[Float32],
    importances: Sequence[Float32] | None,
    weights: Sequence[float],
    scale: float = 1.0,
) -> Float64:
    """`base + lambda * sum_m w_m F_m (x_m - base) / sum_m w_m F_m`, column by column in float64.

    `importances` has (n_matrices, n_cols) of each expert; None: all columns matter alike. So do those that
    matter to no expert.
    """
    n_cols = base.shape[-1]
    n_matrices = 1 if importances is None else len(importances[0])
    shape = (n_matrices, -1, n_cols)
    merged = base.astype(np.float64).reshape(shape)
    for matrix in range(n_matrices):
        for column in range(n_cols):
            own = [
                w * (1.0 if importances is None else float(importances[m][matrix, column]))
                for m, w in enumerate(weights)
            ]
            if sum(own) == 0:
                own = list(weights)
            for share, expert in zip(own, experts, strict=True):
                delta = (expert - base).astype(np.float64).reshape(shape)[matrix, :, column]
                merged[matrix, :, column] += scale * share / sum(own) * delta
    return merged.reshape(base.shape)
