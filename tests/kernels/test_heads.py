"""Sketches of heads against a dense projection, for every cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.kernels import heads

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
S = 64
WRAP = 1 << 64


@pytest.fixture(autouse=True)
def _wrapping() -> Iterator[None]:
    """With NUMBA_DISABLE_JIT the hashes run on NumPy scalars, which warn where integers wrap."""
    with np.errstate(over="ignore"):
        yield


def draw(key: int, width: int) -> tuple[NDArray[np.int32], Float64]:
    buckets, signs = np.empty(width, np.int32), np.empty(width)
    heads.draw_sketch(np.uint64(key), S, buckets, signs)
    return buckets, signs


def dense(buckets: NDArray[np.int32], signs: Float64) -> Float64:
    """The projection as the matrix that it stands for."""
    matrix = np.zeros((buckets.size, S))
    matrix[np.arange(buckets.size), buckets] = signs
    return matrix


def splitmix(key: int, i: int) -> int:
    z = (key + i * 0x9E3779B97F4A7C15) % WRAP
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WRAP
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WRAP
    return z ^ (z >> 31)


def test_draw_is_a_hash_of_key_and_index() -> None:
    buckets, signs = draw(WRAP - 3, 200)
    hashes = [splitmix(WRAP - 3, i) for i in range(200)]
    assert buckets.tolist() == [(z >> 32) % S for z in hashes]
    assert signs.tolist() == [1.0 if z & 1 else -1.0 for z in hashes]
    shorter, _ = draw(WRAP - 3, 50)
    assert shorter.tolist() == buckets[:50].tolist()


def rows_of(x: Float32, buckets: NDArray[np.int32], signs: Float64, height: int) -> Float32:
    out, sums = np.empty((len(x), S), np.float32), np.empty(S)
    for start in range(0, len(x), height):
        block = np.ascontiguousarray(x[start : start + height])
        heads.sketch_rows(block.reshape(-1), buckets, signs, sums, out[start : start + height])
    return out


def columns_of(x: Float32, buckets: NDArray[np.int32], signs: Float64, height: int) -> Float64:
    out = np.zeros((S, x.shape[1]))
    for start in range(0, len(x), height):
        block = np.ascontiguousarray(x[start : start + height])
        heads.sketch_columns(block.reshape(-1), start, buckets, signs, out)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 300), (129, 64)])
def test_sketches_are_the_projection_for_every_block_height(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)
    buckets, signs = draw(9, max(shape))
    right = buckets[: shape[1]], signs[: shape[1]]
    whole = rows_of(x, *right, len(x))
    np.testing.assert_allclose(whole, x @ dense(*right), rtol=1e-6, atol=1e-6)
    left = columns_of(x, buckets, signs, len(x))
    wanted = dense(buckets[: shape[0]], signs[: shape[0]]).T @ x.astype(np.float64)
    np.testing.assert_allclose(left, wanted, rtol=1e-12, atol=1e-12)
    for height in (1, 3, 16):
        assert np.array_equal(rows_of(x, *right, height), whole)
        assert np.array_equal(columns_of(x, buckets, signs, height), left)


def test_distances_and_norms() -> None:
    rng = np.random.default_rng(0)
    for m in (1, 3, 4, 130):
        a = rng.standard_normal((5, m)).astype(np.float32)
        b = rng.standard_normal((3, m)).astype(np.float32)
        b[1] = a[4]
        out, norms = np.empty((5, 3)), np.empty(5)
        heads.squared_distances(a, b, out)
        heads.squared_norms(a, norms)
        differences = a.astype(np.float64)[:, None] - b
        np.testing.assert_allclose(out, (differences**2).sum(axis=2), rtol=1e-12)
        np.testing.assert_allclose(norms, (a.astype(np.float64) ** 2).sum(axis=1), rtol=1e-12)
        assert out[4, 1] == 0.0


def test_the_estimate_has_the_moments_of_a_dense_projection() -> None:
    """Mean tr G, variance 2/s * sum of G_ij^2 off the diagonal, G the Gram matrix of a difference."""
    rng = np.random.default_rng(4)
    # Correlated columns, as weights have.
    x = (rng.standard_normal((8, 6)) @ rng.standard_normal((6, 96))).astype(np.float32)
    gram = x.T.astype(np.float64) @ x
    variance = 2 / S * ((gram**2).sum() - (np.diag(gram) ** 2).sum())
    n = 800
    estimates = np.array([(rows_of(x, *draw(key, 96), 8) ** 2).sum() for key in range(n)])
    assert abs(estimates.mean() - np.trace(gram)) < 4 * np.sqrt(variance / n)
    assert 0.8 < estimates.var() / variance < 1.25
