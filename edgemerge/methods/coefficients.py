"""From Gram matrices to the factors of methods that combine the models' tensors linearly.

`G[m, n] = <x_m, x_n>` of the tensors, or of the task vectors where there is a base. Means on the sphere are
never made as tensors: a step along a geodesic changes the factors of the models only, so any number of steps
costs two reads. Sums are exact (`math.fsum`), so no Python and no processor rounds them otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgemerge.errors import MismatchError
from edgemerge.types import Float64

__all__ = ["karcher_factors", "multislerp_factors", "nuslerp_factors", "stock_factors"]

SHORTEST = 1e-7  # norm by which NuSLERP divides at least
# Sine squared below which it interpolates along a line. mergekit has 1e-16, less than dot products tell: near
# the opposite of a vector it then adds multiples of rounding errors.
COLINEAR = 1e-14
SMALLEST_PRODUCT = 1e-6  # of two norms, by which Model Stock divides at least
SINGULAR = 1e-6  # Model Stock's denominator below which it keeps the base
CANCELLED = 1e-7  # length of a mean of directions that is the rounding of dot products alone
ANTIPODE = 1e-7  # sine of an angle that says nothing of the direction any more


def nuslerp_factors(
    left_squared: float, product: float, right_squared: float, t: float
) -> tuple[float, float]:
    """Factors of two vectors, t of the way from the left to the right one (NuSLERP, mergekit 0.1.5).

    Parameters
    ----------
    left_squared, product, right_squared : float
        Dot products of the vectors.
    t : float
        0: the left vector; 1: the right one.
    """
    norms = max(math.sqrt(left_squared), SHORTEST) * max(math.sqrt(right_squared), SHORTEST)
    cosine = max(-1.0, min(1.0, product / norms))
    if 1.0 - cosine * cosine <= COLINEAR:
        return 1.0 - t, t
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


def multislerp_factors(grams: Float64, weights: Float64, eps: float) -> Float64:
    """Factors of Multi-SLERP (Goddard, mergekit 0.1.5): the mean direction, at the mean length.

    The method steps from the normalised mean of the directions along the mean of their tangents. That mean
    is zero at this point, so the length of the step is `eps` alone.

    Parameters
    ----------
    grams : (n, n) float64
        Of at least two vectors.
    weights : (n,) float64
        Of the models; normalised where that is wanted.
    eps : float
        Added to norms; the least norm of a mean, as far as dot products tell.

    Raises
    ------
    MismatchError
        The directions of three or more models cancel.
    """
    if not np.isfinite(grams).all():  # a task vector overflowed: the result shows it
        return np.full(len(weights), np.nan)
    norms = [math.sqrt(x) for x in np.diagonal(grams)]
    if not any(norms):
        return np.zeros(len(weights))
    pulls = [w / (norm + eps) if norm else 0.0 for w, norm in zip(weights, norms, strict=True)]
    length = math.sqrt(max(0.0, _quadratic(pulls, grams)))
    if length <= max(eps, CANCELLED * math.fsum(map(abs, weights))):
        if len(weights) == 2:
            return weights
        raise MismatchError(
            "the directions of the models cancel in multislerp; use other weights, or linear"
        )
    scale = math.cos(eps) * math.fsum(w * norm for w, norm in zip(weights, norms, strict=True))
    return np.array(pulls) * (scale / length)


def karcher_factors(grams: Float64, max_iter: int, tol: float) -> Float64:
    """Factors of the Karcher mean of the models' directions, at their mean length (mergekit 0.1.5).

    The mean's direction has coordinates in the plane of the models: rows of a Cholesky factor of the Gram
    matrix stand for the directions. There the iteration is as exact as on whole tensors in float64.

    Parameters
    ----------
    grams : (n, n) float64
        Of the models' tensors.
    max_iter : int
        Steps at most.
    tol : float
        Norm up to which a tensor has no direction, a mean is none, and a step is the last.
    """
    norms = [math.sqrt(x) for x in np.diagonal(grams)]
    factors = np.zeros(len(norms))
    valid = [m for m, norm in enumerate(norms) if norm > tol]
    if valid:
        cosines = [[float(grams[a, b]) / (norms[a] * norms[b]) for b in valid] for a in valid]
        scale = math.fsum(norms) / len(norms)
        mean = _karcher_mean(_cholesky(cosines), max_iter, tol)
        for m, factor in zip(valid, mean, strict=True):
            factors[m] = scale * factor / norms[m]
    return factors


def _karcher_mean(units: Sequence[Sequence[float]], max_iter: int, tol: float) -> list[float]:
    """Return the mean of unit vectors on the sphere as factors of them."""
    n = len(units)
    factors = [1.0 / n] * n
    length = _norm(_combine(factors, units))
    factors = [1.0] + [0.0] * (n - 1) if length <= tol else [x / length for x in factors]
    for _ in range(max_iter):
        mean = _combine(factors, units)
        step = [0.0] * n
        for m, unit in enumerate(units):
            cosine = max(-1.0, min(1.0, _dot(mean, unit)))
            away = [u - cosine * x for u, x in zip(unit, mean, strict=True)]
            sine = _norm(away)
            angle = math.atan2(sine, cosine)
            if angle < tol or sine == 0.0 or (sine < ANTIPODE and cosine < 0.0):
                continue
            pull = angle / sine / n
            step = [s - pull * cosine * x for s, x in zip(step, factors, strict=True)]
            step[m] += pull
        size = _norm(_combine(step, units))
        if size <= tol:
            break
        turn = math.sin(size) / size
        factors = [math.cos(size) * x + turn * s for x, s in zip(factors, step, strict=True)]
        length = _norm(_combine(factors, units))
        if length > tol:
            factors = [x / length for x in factors]
    return factors


def _cholesky(cosines: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return vectors with these dot products; a direction that others span adds no coordinate."""
    n = len(cosines)
    rows = [[0.0] * n for _ in range(n)]
    for k in range(n):
        left = cosines[k][k] - math.fsum(x * x for x in rows[k][:k])
        if left <= n * 2.0**-52:
            continue
        rows[k][k] = math.sqrt(left)
        for m in range(k + 1, n):
            rows[m][k] = (cosines[k][m] - _dot(rows[k][:k], rows[m][:k])) / rows[k][k]
    return rows


def stock_factors(grams: Float64) -> Float64:
    """Factors of task vectors in Model Stock (Jang et al. 2024, eq. 8, with mergekit 0.1.5's bounds).

    Parameters
    ----------
    grams : (..., n, n) float64
        Of task vectors, n at least 2; one for each row, or one.

    Returns
    -------
    (...,) float64
        The factor of every task vector: t / n. It is negative where the cosines are.
    """
    n = grams.shape[-1]
    norms: Float64 = np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1))
    total: Float64 = np.zeros(grams.shape[:-2])
    for a in range(n):
        for b in range(a + 1, n):
            product = np.maximum(norms[..., a] * norms[..., b], SMALLEST_PRODUCT)
            with np.errstate(invalid="ignore"):  # task vectors that overflowed: the result shows it
                total = total + np.clip(grams[..., a, b] / product, -1.0, 1.0)
    mean = total / (n * (n - 1) / 2)
    divisor = 1.0 + (n - 1) * mean
    factor: Float64 = np.zeros_like(mean)
    np.divide(mean, divisor, out=factor, where=np.abs(divisor) >= SINGULAR)
    return factor


def _combine(factors: Sequence[float], vectors: Sequence[Sequence[float]]) -> list[float]:
    return [_dot(factors, column) for column in zip(*vectors, strict=True)]


def _norm(x: Sequence[float]) -> float:
    return math.sqrt(_dot(x, x))


def _dot(x: Sequence[float], y: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def _quadratic(factors: Sequence[float], grams: Float64) -> float:
    return math.fsum(
        a * b * float(grams[i, k]) for i, a in enumerate(factors) for k, b in enumerate(factors)
    )
