"""A slow, obviously right NumPy twin of ResMerge: whole matrices in float64, no Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.twins.methods import subtract
from tests.twins.singular import first_directions

Float64 = NDArray[np.float64]

SEARCHED = 15  # directions beside the head's


def cosine(x: Float64, y: Float64) -> float:
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float((x * y).sum()) / size if size else 0.0


def split(change: Float64, rank: int) -> tuple[Float64, Float64]:
    """Head and residual of a change; no residual where nothing but rounding is left."""
    if not change.any():
        return change, change
    u, sizes, v = first_directions(change, rank + SEARCHED)
    head = (u[:rank].T * sizes[:rank]) @ v[:rank]
    residual = change - head
    return head, residual * (np.linalg.norm(residual) > 1e-5 * np.linalg.norm(change))


def consensus(residuals: Sequence[Float64], *, is_known: bool) -> Float64:
    """SRC-A: the mean direction of residuals, shortened as far as they do not agree."""
    n = len(residuals)
    sizes = [float(np.linalg.norm(r)) for r in residuals]
    units = [r / size if size else r for r, size in zip(residuals, sizes, strict=True)]
    total = np.sum(units, axis=0)
    coherence = sum(cosine(unit, total) for unit in units) / n
    if coherence <= 1 / np.sqrt(n) + 1e-12:
        return np.asarray(np.mean(residuals, axis=0))
    pairs = [cosine(x, y) for x, y in combinations(units, 2)]
    score = ((np.mean(pairs) + 1) / 2 + (coherence + 1) / 2) / 2 if is_known else 0.0
    return np.asarray(
        coherence ** (1 - 0.3 * score) * np.mean(sizes) * total / np.linalg.norm(total)
    )


def agreement(heads: Sequence[Float64]) -> float:
    """Mean of the positive parts of cosines between heads that there are."""
    found = [head for head in heads if head.any()]
    pairs = [max(0.0, cosine(x, y)) for x, y in combinations(found, 2)]
    return float(np.mean(pairs)) if pairs else float(len(found))


def merge(
    changes: Sequence[Float64], rank: int, rho: float = 0.2, *, is_known: bool = True
) -> Float64:
    """The merged change of a matrix: A and the correction by heads."""
    parts = [split(change, rank) for change in changes]
    heads = [head for head, _ in parts]
    result = consensus([residual for _, residual in parts], is_known=is_known)
    mean = np.mean(heads, axis=0)
    if mean.any():
        size = rho * agreement(heads) * float(np.linalg.norm(result))
        result = result + size * mean / np.linalg.norm(mean)
    return result


def resmerge(
    base: NDArray[Any],
    models: Sequence[NDArray[Any]],
    rank: int = 1,
    scale: float = 1.0,
    rho: float = 0.2,
    *,
    is_known: bool = True,
) -> Float64:
    """Sun et al. 2026 (arXiv 2606.02252), of a tensor of any shape."""
    whole = [subtract(base, x).astype(np.float64) for x in models]
    changes = [x.reshape(-1, base.shape[-1]) for x in whole]
    if base.ndim == 1 or rank >= min(changes[0].shape):
        merged = np.asarray(np.mean(changes, axis=0))
    else:
        merged = merge(changes, rank, rho, is_known=is_known)
    return base.astype(np.float64) + scale * merged.reshape(base.shape)
