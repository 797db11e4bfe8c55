"""Slow, obviously right NumPy twins of LiNeS, SCE, RAM, Arcee Fusion, NearSwap: whole tensors in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.twins.methods import subtract

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def deltas_of(base: Float32, models: Sequence[Float32]) -> Float64:
    return np.stack([subtract(base, x).astype(np.float64) for x in models])


def sce_selected(deltas: Float64, topk: float) -> NDArray[np.bool_]:
    """The largest variances; of equal ones the first in flat order."""
    variances = deltas.var(axis=0).astype(np.float32).ravel()
    n_varying = int(np.count_nonzero(variances))
    k = min(n_varying, int(np.float32(n_varying) * np.float32(topk)))
    mask = np.zeros(variances.size, np.bool_)
    mask[np.argsort(-variances, kind="stable")[:k]] = True
    return mask.reshape(deltas.shape[1:])


def sce(base: Float32, models: Sequence[Float32], *, select_topk: float = 1.0) -> Float64:
    """Wan et al. 2024: select by variance, weigh by squares, erase what the sum's sign outvotes."""
    deltas = deltas_of(base, models)
    if select_topk < 1:
        deltas = np.where(sce_selected(deltas, select_topk), deltas, 0.0)
    energies = np.mean(deltas.reshape(len(deltas), -1) ** 2, axis=1)
    n = len(deltas)
    weights = energies / energies.sum() if energies.sum() >= 1e-6 else np.full(n, 1 / n)
    agree = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1.0, -1.0)
    column = weights.reshape(-1, *[1] * base.ndim) * agree
    merged = (column * deltas).sum(axis=0) / np.maximum(column.sum(axis=0), 1e-6)
    return np.asarray(base + merged)


def ram(base: Float32, models: Sequence[Float32], *, epsilon: float = 1e-5) -> Float64:
    """Mean of the changes above epsilon."""
    return ramplus_tl(base, models, epsilon=epsilon, r=0.0)


def ramplus_tl(
    base: Float32,
    models: Sequence[Float32],
    *,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
) -> Float64:
    """The same, with what only one model changed enlarged by its share of changes in common."""
    deltas = deltas_of(base, models)
    changed = np.abs(deltas) > np.float32(epsilon)
    count = changed.sum(axis=0)
    merged = np.zeros(base.shape)
    for delta, own in zip(deltas, changed, strict=True):
        shared, alone = np.sum(own & (count > 1)), np.sum(own & (count == 1))
        factor = 1 + r * np.clip(shared / max(float(alone), epsilon), 0, alpha)
        merged += np.where(own, delta, 0) * np.where(count == 1, factor, 1 / np.maximum(count, 1))
    return np.asarray(base + merged)


def softmax(x: Float32) -> Float64:
    rows = x.astype(np.float64)
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True) + 1e-8)


def importances(base: Float32, x: Float32) -> Float32:
    """Size of each change, times the divergence of its row's softmax."""
    p, q = softmax(x), softmax(base)
    divergences = np.maximum(np.sum(p * np.log(p / q), axis=-1, keepdims=True), 0)
    return np.asarray(np.abs(subtract(base, x)) * divergences).astype(np.float32)


def arcee_fusion(base: Float32, models: Sequence[Float32]) -> Float64:
    """Changes whose importance is median + 1.5 (q3 - q1) or more, with quantiles of all elements."""
    (x,) = models
    found = importances(base, x)
    ordered = np.sort(found.ravel()).astype(np.float64)
    q1, median, q3 = (ordered[int(q * (found.size - 1))] for q in (0.25, 0.5, 0.75))
    kept = found >= median + 1.5 * (q3 - q1)
    return np.asarray(base.astype(np.float64) + np.where(kept, subtract(base, x), 0))


def nearswap(base: Float32, models: Sequence[Float32], *, t: float) -> Float64:
    """Weight t / |difference| for the model, 1 at most."""
    a, b = base.astype(np.float64), models[0].astype(np.float64)
    weight = np.clip(t / np.maximum(np.abs(a - b), 1e-6), 0, 1)
    return np.asarray(weight * b + (1 - weight) * a)


def lines(
    base: Float32,
    models: Sequence[Float32],
    weights: Sequence[float],
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    depth: float = 0.0,
) -> Float64:
    """arXiv 2410.17146, eq. 2: the sum of task vectors by a factor linear in depth."""
    total = np.tensordot(np.array(weights), deltas_of(base, models), 1)
    return np.asarray(base + (alpha + beta * depth) * total)


TWINS: dict[str, Callable[..., Any]] = {
    "lines": lines,
    "sce": sce,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "arcee_fusion": arcee_fusion,
    "nearswap": nearswap,
}
