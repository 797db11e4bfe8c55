"""Slow, obviously right NumPy twins of the merge kernels and of every merge method.

Written from the published definitions, not from the code under test: whole tensors, float64, a
stable argsort where entries are ranked. Only a task vector is float32, as ranks are taken of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

GAMMA = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1
DOUBT = 1e-6  # of the sum of magnitudes: float32 may get the sign of a smaller sum wrong

# What each method does to task vectors, and what it does where a recipe is silent (mergekit 0.1.5).
PRUNES = {
    "task_arithmetic": None,
    "ties": "largest",
    "dare_linear": "random",
    "dare_ties": "random",
    "della": "ranked",
    "della_linear": "ranked",
    "breadcrumbs": "band",
    "breadcrumbs_ties": "band",
}
ELECTS = {"ties", "dare_ties", "della", "breadcrumbs_ties"}
NORMALIZES = {"ties", "della"}
RESCALES = {"dare_linear", "dare_ties", "della", "della_linear"}
METHODS = ("linear", "slerp", "passthrough", *PRUNES)


@dataclass(frozen=True)
class Merged:
    """The result, and where sign election hangs on rounding: its sums all but cancel."""

    values: Float64
    doubtful: Mask | None = None


def subtract(base: Float32, x: Float32) -> Float32:
    """float64 holds more than twice float32's digits: rounding twice is rounding once."""
    return (x.astype(np.float64) - base.astype(np.float64)).astype(np.float32)


# -- which entries stay --------------------------------------------------------


def stable_order(delta: NDArray[Any]) -> NDArray[np.int64]:
    return np.argsort(np.abs(delta.ravel()), kind="stable")


def keep_largest(delta: NDArray[Any], density: float) -> Mask:
    """The k largest magnitudes of the tensor; of equal ones the first in flat order."""
    mask = np.zeros(delta.size, np.bool_)
    descending = np.argsort(-np.abs(delta.ravel()), kind="stable")
    mask[descending[: max(1, int(density * delta.size))]] = True
    return mask.reshape(delta.shape)


def keep_band(delta: NDArray[Any], density: float, gamma: float) -> Mask:
    """Without the gamma largest, the next largest so that a share of `density` stays."""
    n = delta.size
    target, top = int(density * n), int(gamma * n)
    bottom = max(0, n - target - top)
    mask = np.zeros(n, np.bool_)
    mask[stable_order(delta)[bottom : bottom + target]] = True
    return mask.reshape(delta.shape)


def splitmix64(state: int) -> int:
    """Finaliser of Steele, Lea and Flood 2014, in Python's integers."""
    z = state & WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


def random_keys(seed: int, tensor: str, deltas: Sequence[Float32]) -> list[int]:
    """Of seed, tensor, 64 rows of the task vector, and how many experts before have the same rows."""
    samples = []
    for delta in deltas:
        rows = delta.reshape(-1, delta.shape[-1])
        count = min(64, len(rows))
        sample = b"".join(rows[i * len(rows) // count].tobytes() for i in range(count))
        samples.append(f"{seed}|{tensor}|".encode() + sample)
    numbered = [s + samples[:k].count(s).to_bytes(4, "little") for k, s in enumerate(samples)]
    return [int.from_bytes(hashlib.blake2b(s, digest_size=8).digest(), "little") for s in numbered]


def uniforms(key: int, n: int, first: int = 0) -> Float64:
    """u_i in [0, 1): the top 24 bits of the hash of key and flat index."""
    numbers = [splitmix64(key + (first + i) * GAMMA) >> 40 for i in range(n)]
    return np.array(numbers, np.float64) / (1 << 24)


def keep_random(key: int, shape: tuple[int, ...], density: float) -> Mask:
    return (uniforms(key, math.prod(shape)) < density).reshape(shape)


def keep_probabilities(delta: NDArray[Any], density: float, epsilon: float) -> Float64:
    """By rank in the row: density - epsilon for the smallest, density + epsilon for the largest."""
    n_cols = delta.shape[-1]
    if n_cols == 1:
        return np.full(delta.shape, density)
    p = np.empty(delta.shape, np.float64)
    for row, magnitudes in zip(p.reshape(-1, n_cols), delta.reshape(-1, n_cols), strict=True):
        for rank, i in enumerate(stable_order(magnitudes)):
            row[i] = (density - epsilon) + rank / (n_cols - 1) * (2 * epsilon)
    return p


def keep_ranked(key: int, delta: NDArray[Any], density: float, epsilon: float) -> Mask:
    p = keep_probabilities(delta, density, epsilon)
    return uniforms(key, delta.size).reshape(delta.shape) < p


def prune(
    kind: str | None, delta: Float32, settings: Mapping[str, Any], rescale: Any, key: int
) -> Float64:
    """One pruned, rescaled task vector."""
    density = settings.get("density", 1.0)
    exact = delta.astype(np.float64)
    if kind is None or density >= 1:
        return exact
    if density <= 0:
        return np.zeros_like(exact)
    p: Any = density
    if kind == "largest":
        mask = keep_largest(delta, density)
    elif kind == "band":
        mask = keep_band(delta, density, settings.get("gamma", 0.01))
    elif kind == "random":
        mask = keep_random(key, delta.shape, density)
    else:
        epsilon = settings.get("epsilon", 0.15)
        mask = keep_ranked(key, delta, density, epsilon)
        p = keep_probabilities(delta, density, epsilon)
    kept = np.where(mask, exact, 0.0)
    if rescale == "expectation":
        return kept / p if kind in ("random", "ranked") else kept
    if rescale in (True, "l1"):
        before, after = np.abs(exact).sum(), np.abs(kept).sum()
        if before >= 1e-7 and after >= 1e-7:
            return kept * (before / after)
    return kept


# -- how the rest is combined --------------------------------------------------


def elect(
    weights: Sequence[float], normalize: bool, deltas: Sequence[NDArray[Any]] | NDArray[Any]
) -> Merged:
    """Yadav et al. 2023: entries with the sign of the weighted sum; a sum of zero is positive."""
    weighted = np.stack([w * d.astype(np.float64) for w, d in zip(weights, deltas, strict=True)])
    votes = weighted.sum(0)
    agree = np.sign(weighted) == np.where(votes >= 0, 1.0, -1.0)
    total = np.where(agree, weighted, 0.0).sum(0)
    if normalize:
        column = np.array(weights, np.float64).reshape(-1, *[1] * votes.ndim)
        divisor = np.where(agree, column, 0.0).sum(0)
        total = total / np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
    sizes = np.abs(weighted).sum(0)
    return Merged(total, (np.abs(votes) < DOUBT * sizes) & (votes != 0))


def weighted_sum(
    weights: Sequence[float], models: Sequence[NDArray[Any]] | NDArray[Any]
) -> Float64:
    return np.sum([w * x.astype(np.float64) for w, x in zip(weights, models, strict=True)], 0)


def slerp(base: Float32, x: Float32, t: float) -> Float64:
    """Shoemake 1985 on the flattened tensors; lerp where they are all but parallel."""
    v0, v1 = base.astype(np.float64), x.astype(np.float64)
    n0, n1 = np.linalg.norm(v0), np.linalg.norm(v1)
    u0 = v0 / n0 if n0 > 1e-8 else v0
    u1 = v1 / n1 if n1 > 1e-8 else v1
    cosine = float(np.sum(u0 * u1))
    if abs(cosine) > 0.9995:
        return (1 - t) * v0 + t * v1
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * v0 + math.sin(t * angle) * v1) / math.sin(angle)


def merge_tensor(
    method: str,
    base: Float32 | None,
    models: Sequence[tuple[Float32, Mapping[str, Any]]],
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    tensor: str = "",
) -> Merged:
    """Merge one tensor.

    Parameters
    ----------
    models : sequence of (values, settings)
        The experts in the order of the recipe, with weight, density, gamma, epsilon, scale.
    options : mapping, optional
        normalize, rescale, lambda, t.
    tensor : str
        GGUF name in the output, which random masks depend on.
    """
    options = dict(options or {})
    values = [x for x, _ in models]
    if method == "passthrough":
        return Merged(models[0][1].get("scale", 1.0) * values[0].astype(np.float64))
    if method == "slerp":
        assert base is not None
        return Merged(slerp(base, values[0], options["t"]))
    weights = [settings["weight"] for _, settings in models]
    if method == "linear":
        total = sum(weights) if options.get("normalize", True) else 1.0
        return Merged(weighted_sum(weights, values) / total)
    assert base is not None
    normalize = options.get("normalize", method in NORMALIZES)
    rescale = options.get("rescale", method in RESCALES)
    whole = [subtract(base, x) for x in values]
    # What is not pruned has no mask, and is not counted.
    drawn = [k for k, (_, own) in enumerate(models) if 0 < own.get("density", 1.0) < 1]
    keys = dict(zip(drawn, random_keys(seed, tensor, [whole[k] for k in drawn]), strict=True))
    deltas = [
        prune(PRUNES[method], whole[k], settings, rescale, keys.get(k, 0))
        for k, (_, settings) in enumerate(models)
    ]
    if method in ELECTS:
        merged = elect(weights, normalize, deltas)
    else:
        total = sum(weights) if normalize and abs(sum(weights)) >= 1e-8 else 1.0
        merged = Merged(weighted_sum(weights, deltas) / total)
    scale = options.get("lambda", 1.0)
    return Merged(base.astype(np.float64) + scale * merged.values, merged.doubtful)


def worst_error(got: NDArray[Any], want: Merged, scale: float | None = None) -> float:
    """Largest error relative to the tensor's largest magnitude.

    Where either sign may win an election nothing is compared: one place in 1000 at most.
    """
    difference = np.abs(got.astype(np.float64) - want.values)
    if want.doubtful is not None:
        assert want.doubtful.mean() <= 1e-3
        difference = np.where(want.doubtful, 0.0, difference)
    largest = np.abs(want.values).max(initial=0.0) if scale is None else scale
    return float(difference.max(initial=0.0) / max(largest, 1e-30))
