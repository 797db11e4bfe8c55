"""Slow, obviously right NumPy twins of the methods that combine directions: on whole tensors in float64.

Means and tangents are vectors as long as the tensor here; the code under test has factors of the models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.twins.methods import subtract

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def vectors(base: Float32 | None, models: Sequence[Float32]) -> list[Float64]:
    """The models' values, or their task vectors, which are float32."""
    return [(x if base is None else subtract(base, x)).astype(np.float64) for x in models]


def onto(base: Float32 | None, merged: Float64) -> Float64:
    return merged if base is None else base.astype(np.float64) + merged


def model_stock(
    base: Float32 | None, models: Sequence[Float32], *, filter_wise: bool = False
) -> Float64:
    """Jang et al. 2024, eq. 8: t = N cos / (1 + (N - 1) cos) of the way from the base to the mean."""
    assert base is not None
    deltas = [d.reshape(-1, base.shape[-1]) for d in vectors(base, models)]
    parts = range(len(deltas[0])) if filter_wise else [slice(None)]
    merged = np.zeros_like(deltas[0])
    n = len(models)
    for part in parts:
        own = [d[part].ravel() for d in deltas]
        cosines = [
            np.clip(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6), -1, 1)
            for a, b in itertools.combinations(own, 2)
        ]
        cosine = float(np.mean(cosines))
        divisor = 1 + (n - 1) * cosine
        t = n * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
        merged[part] = t * np.mean([d[part] for d in deltas], axis=0)
    return onto(base, merged.reshape(base.shape))


def arc(t: float, left: Float64, right: Float64) -> Float64:
    """Spherical interpolation of two vectors."""
    norms = [max(float(np.linalg.norm(v)), 1e-7) for v in (left, right)]
    cosine = float(np.clip(np.sum(left / norms[0] * right / norms[1]), -1, 1))
    if 1 - cosine**2 <= 1e-14:
        return (1 - t) * left + t * right
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * left + math.sin(t * angle) * right) / math.sin(angle)


def nuslerp(
    base: Float32 | None,
    models: Sequence[Float32],
    weights: Sequence[float],
    *,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Float64:
    """One arc for the tensor, or one per row, or with mergekit's "row wise" one along the first axis."""
    left, right = vectors(base, models)
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    if nuslerp_flatten:
        merged = arc(t, left, right)
    else:
        columns = nuslerp_row_wise and left.ndim > 1
        rows = [v.reshape(-1, v.shape[-1]) for v in (left, right)]
        a, b = (v.T for v in rows) if columns else rows
        arcs = np.stack([arc(t, x, y) for x, y in zip(a, b, strict=True)])
        merged = (arcs.T if columns else arcs).reshape(left.shape)
    return onto(base, merged)


def multislerp(
    base: Float32 | None,
    models: Sequence[Float32],
    weights: Sequence[float],
    *,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Float64:
    """From the mean direction, one step along the mean of all tangents; at the mean length."""
    if len(models) == 1:
        return models[0].astype(np.float64)
    x = vectors(base, models)
    w = np.array(weights) / (sum(weights) if normalize_weights else 1.0)
    norms = [float(np.linalg.norm(v)) for v in x]
    units = [v / (norm + eps) for v, norm in zip(x, norms, strict=True)]
    mean = sum(wi * u for wi, u in zip(w, units, strict=True))
    length = np.linalg.norm(mean)
    if length < eps:
        assert len(models) == 2
        return onto(base, w[0] * x[0] + w[1] * x[1])
    mean = mean / length
    tangent = sum(wi * (u - np.sum(u * mean) * mean) for wi, u in zip(w, units, strict=True))
    size = np.linalg.norm(tangent) + eps
    merged = mean * np.cos(size) + tangent * (np.sin(size) / size)
    return onto(base, np.asarray(merged * np.dot(w, norms)))


def karcher(
    base: Float32 | None, models: Sequence[Float32], *, max_iter: float = 10, tol: float = 1e-5
) -> Float64:
    """Gradient steps on the sphere, from the normalised mean of the directions."""
    assert base is None
    x = vectors(None, models)
    norms = [float(np.linalg.norm(v)) for v in x]
    units = [v / norm for v, norm in zip(x, norms, strict=True) if norm > tol]
    if not units:
        return np.zeros_like(x[0])
    mean = np.mean(units, axis=0)
    length = np.linalg.norm(mean)
    mean = units[0] if length < tol else mean / length
    for _ in range(int(max_iter)):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = float(np.clip(np.sum(mean * unit), -1, 1))
            away = unit - cosine * mean
            sine = float(np.linalg.norm(away))
            if sine > 1e-7:
                tangent += math.atan2(sine, cosine) / sine * away / len(units)
        size = float(np.linalg.norm(tangent))
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        mean = mean / np.linalg.norm(mean)
    return np.asarray(np.mean(norms) * mean)


TWINS: dict[str, Callable[..., Any]] = {
    "model_stock": model_stock,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
}
