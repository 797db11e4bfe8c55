"""Kernels of weighting and of moving heads against NumPy, bit by bit, on ordinary and nasty numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemerge.kernels import gram, permute, scalars

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SHAPES = [(1, 1, 1), (2, 1, 31), (3, 7, 1), (2, 5, 37), (4, 3, 4097)]  # models, rows, columns
KINDS = ["normal", "zeros", "denormal", "wide"]


def numbers(kind: str, shape: tuple[int, ...], seed: int = 0) -> Float32:
    rng = np.random.default_rng([seed, *shape])
    normal = rng.standard_normal(shape)
    if kind == "zeros":
        return np.where(normal > 0, np.float32(-0.0), np.float32(0.0)).astype(np.float32)
    if kind == "denormal":
        return (rng.integers(-500, 500, shape) * 2.0**-149).astype(np.float32)
    if kind == "wide":
        return (normal * 10.0 ** rng.uniform(-30, 30, shape)).astype(np.float32)
    return normal.astype(np.float32)


def grams_of(x: Float32, n_cols: int) -> Float64:
    """The kernel's answer in memory that was full of rubbish."""
    n_models, n = x.shape
    out = np.full((n // n_cols, n_models, n_models), np.nan)
    gram.row_grams(x, n_cols, np.full(scalars.LANES, np.nan), out)
    return out


# -- Gram matrices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_models", "n_rows", "n_cols"), SHAPES)
def test_a_rows_gram_is_summed_in_lanes_and_these_in_halves(
    n_models: int, n_rows: int, n_cols: int, kind: str
) -> None:
    x = numbers(kind, (n_models, n_rows * n_cols))
    rows = x.reshape(n_models, n_rows, n_cols).astype(np.float64)
    products = np.einsum("ari,bri->rabi", rows, rows)
    lanes = np.zeros((*products.shape[:-1], -(-n_cols // scalars.LANES) * scalars.LANES))
    lanes[..., :n_cols] = products
    lanes = np.cumsum(lanes.reshape(*products.shape[:-1], -1, scalars.LANES), axis=-2)[..., -1, :]
    while (half := lanes.shape[-1] // 2) > 0:
        lanes = lanes[..., :half] + lanes[..., half:]
    want = lanes[..., 0]
    got = grams_of(x, n_cols)
    assert np.array_equal(got, want)
    assert np.array_equal(got, got.swapaxes(1, 2))
    exact = np.einsum("rabi->rab", products.astype(np.longdouble))
    sizes = np.einsum("rabi->rab", np.abs(products))
    assert (np.abs(got - exact) <= n_cols * 2.0**-53 * sizes).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_gram_depends_on_no_other_row(kind: str) -> None:
    x = numbers(kind, (3, 6 * 19))
    whole = grams_of(x, 19)
    for start, stop in ((0, 1), (1, 4), (4, 6), (5, 6)):
        part = np.ascontiguousarray(x[:, start * 19 : stop * 19])
        assert grams_of(part, 19).tobytes() == whole[start:stop].tobytes()


def test_no_product_of_float32_overflows() -> None:
    x = np.full((2, 8), np.finfo(np.float32).max, np.float32)
    assert np.isfinite(grams_of(x, 4)).all()


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4), (1, 2, 3, 4, 5, 6)])
def test_rows_are_added_in_order_to_what_is_there(cuts: tuple[int, ...]) -> None:
    rows = numbers("wide", (7, 9)).astype(np.float64)
    start = numbers("normal", (1, 9)).astype(np.float64)[0]
    want = start.copy()
    for row in rows:
        want += row
    total = start.copy()
    for block in np.split(rows, list(cuts)):
        gram.add_rows(np.ascontiguousarray(block), total)
    assert total.tobytes() == want.tobytes()


# -- a factor per row ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_models", "n_rows", "n_cols"), SHAPES)
def test_rows_are_combined_in_float32(n_models: int, n_rows: int, n_cols: int, kind: str) -> None:
    x = numbers(kind, (n_models, n_rows * n_cols))
    factors = numbers("normal", (n_rows, n_models), seed=1)
    rows = x.reshape(n_models, n_rows, n_cols)
    want = factors[:, 0, None] * rows[0]
    for k in range(1, n_models):
        want = want + factors[:, k, None] * rows[k]
    others = x[1:].copy()
    gram.combine_rows(factors, n_cols, x)
    assert want.dtype == np.float32
    assert np.array_equal(x[0], want.ravel())
    assert np.array_equal(x[1:], others)


def test_a_combined_row_depends_on_no_other() -> None:
    x, factors = numbers("normal", (3, 6 * 19)), numbers("normal", (6, 3), seed=1)
    whole = x.copy()
    gram.combine_rows(factors, 19, whole)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        part = np.ascontiguousarray(x[:, start * 19 : stop * 19])
        gram.combine_rows(factors[start:stop], 19, part)
        assert part[0].tobytes() == whole[0, start * 19 : stop * 19].tobytes()


# -- columns ------------------------------------------------------------------------------------------


def mix(csr: tuple[Any, Any, Any], x: Float32, n_cols: int) -> Float32:
    out = x.ravel().copy()
    permute.mix_columns(*csr, np.full(n_cols, np.nan, np.float32), out)
    return out.reshape(x.shape)


def csr(matrix: list[list[tuple[int, float]]]) -> tuple[Any, Any, Any]:
    counts = np.cumsum([0, *map(len, matrix)])
    entries = [entry for column in matrix for entry in column]
    indices = np.array([i for i, _ in entries], np.int64)
    return counts, indices, np.array([w for _, w in entries], np.float32)


@given(order=st.permutations(range(17)), n_rows=st.integers(1, 4), kind=st.sampled_from(KINDS))
def test_a_permutation_moves_columns_bit_by_bit(order: list[int], n_rows: int, kind: str) -> None:
    x = numbers(kind, (n_rows, 17))
    moved = mix(csr([[(i, 1.0)] for i in order]), x, 17)
    assert moved.tobytes() == x[:, order].tobytes()
    back = mix(csr([[(int(i), 1.0)] for i in np.argsort(order)]), moved, 17)
    assert back.tobytes() == x.tobytes()


@given(
    matrix=st.lists(
        st.lists(st.tuples(st.integers(0, 8), st.floats(0, 1, width=32)), min_size=1, max_size=4),
        min_size=9,
        max_size=9,
    ),
    kind=st.sampled_from(KINDS),
)
def test_a_mix_is_a_sum_in_float32(matrix: list[list[tuple[int, float]]], kind: str) -> None:
    x = numbers(kind, (5, 9))
    want = np.zeros_like(x)
    for j, column in enumerate(matrix):
        (first, weight), *others = column
        total = np.float32(weight) * x[:, first]
        for i, weight in others:
            total = total + np.float32(weight) * x[:, i]
        want[:, j] = total
    got = mix(csr(matrix), x, 9)
    assert np.array_equal(got, want)
    for row in range(5):  # whatever the other rows are
        assert mix(csr(matrix), x[row : row + 1], 9).tobytes() == got[row].tobytes()
