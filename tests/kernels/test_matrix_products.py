"""Matrix products, orthonormal vectors and eigenvectors against NumPy, and one order of every sum."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.kernels import matrix_products, scalars, small_matrices
from edgemerge.methods.directions import SCRATCH_SHAPE, eigenvectors
from edgemerge.native import KernelFile

Float32 = NDArray[np.float32]
products, small = KernelFile("matrix_products"), KernelFile("small_matrices")

SHAPES = [(1, 1, 1), (3, 5, 7), (4, 64, 512), (6, 130, 513), (33, 7, 1100)]


def matrix(*shape: int) -> Float32:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def scratch() -> Float32:
    return np.full(SCRATCH_SHAPE, np.nan, np.float32)


def add_in_order(left: Float32, right: Float32, out: Float32) -> Float32:
    """Every element adds its products one after the other, each rounded to float32."""
    total = out.copy()
    for k in range(left.shape[1]):
        total += left[:, k : k + 1] * right[k]
    return total


def test_scratch_has_the_shape_that_kernels_expect() -> None:
    assert SCRATCH_SHAPE == (4 + matrix_products.DEPTH, matrix_products.WIDTH)


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_a_product_is_added_in_order(m: int, k: int, n: int) -> None:
    left, right, out = matrix(m, k), matrix(k, n), matrix(m, n)
    want = add_in_order(left, right, out)
    products.add_product(left, right, scratch()[:4], out)
    assert np.array_equal(out, want)


@pytest.mark.parametrize(("q", "n", "m"), SHAPES)
def test_a_projection_is_a_product_with_the_rows_transposed(q: int, n: int, m: int) -> None:
    directions, rows = matrix(q, n), matrix(m, n)
    out = np.full((q, m), np.nan, np.float32)
    products.project(rows, directions, scratch(), out)
    assert np.array_equal(out, add_in_order(directions, rows.T, np.zeros((q, m), np.float32)))


def test_a_product_over_rows_does_not_show_where_they_are_cut() -> None:
    rows, found = matrix(301, 600), matrix(9, 301)
    results = set()
    for height in (301, 1, 64, 100):
        out = np.zeros((9, 600), np.float32)
        for start in range(0, 301, height):
            part = np.ascontiguousarray(found[:, start : start + height])
            products.add_product(part, rows[start : start + height], scratch()[:4], out)
        results.add(out.tobytes())
    assert len(results) == 1


def test_grams_are_exact_to_float64() -> None:
    rows, out = matrix(50, 7), np.ones((7, 7))
    products.add_gram(rows, out)
    wide = rows.astype(np.float64)
    assert out == pytest.approx(1 + wide.T @ wide, rel=1e-14)


def test_vectors_become_orthonormal_and_those_spanned_zero() -> None:
    vectors = matrix(6, 70)
    vectors[4] = vectors[1] - 3 * vectors[2]
    vectors[5] *= np.float32(1e-6)
    before = vectors.astype(np.float64)
    lanes = np.empty(scalars.LANES)
    products.orthonormalise(vectors, lanes)
    keep = [0, 1, 2, 3, 5]
    assert np.all(vectors[4] == 0)
    assert vectors[keep] @ vectors[keep].T == pytest.approx(np.eye(5), abs=1e-6)
    coefficients = before[keep] @ vectors[keep].astype(np.float64).T
    assert np.abs(before[keep] - coefficients @ vectors[keep]).max() < 1e-5
    zeros = np.zeros((2, 5), np.float32)
    products.orthonormalise(zeros, lanes)
    assert np.all(zeros == 0)


def test_small_products_are_those_of_numpy() -> None:
    left, right = matrix(5, 9).astype(np.float64), matrix(9, 4).astype(np.float64)
    out = np.full((5, 4), np.nan)
    small.multiply(left, right, out)
    assert out == pytest.approx(left @ right, rel=1e-13)


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_eigenvectors_are_those_of_lapack(n: int) -> None:
    rows = matrix(2 * n, n).astype(np.float64) * 2.0 ** -np.arange(n)
    gram = rows.T @ rows
    values, vectors = eigenvectors(gram)
    want = np.linalg.eigvalsh(gram)[::-1]
    kept = want > 1e-10 * want[0]
    assert values[kept] == pytest.approx(want[kept], rel=1e-9)
    assert np.all(values[~kept] == 0)
    assert vectors @ vectors.T == pytest.approx(np.eye(n), abs=1e-13)
    assert vectors @ gram @ vectors.T == pytest.approx(np.diag(want), abs=1e-13 * want[0])


def test_eigenvectors_of_nothing_and_of_equal_values() -> None:
    values, vectors = eigenvectors(np.zeros((3, 3)))
    assert np.all(values == 0)
    assert np.array_equal(vectors, np.eye(3))
    values, _ = eigenvectors(np.eye(3))
    assert np.all(values == 1)
    assert small_matrices.MOST_SWEEPS > 10
