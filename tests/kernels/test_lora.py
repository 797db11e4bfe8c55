"""Kernels of LoRA and DoRA against plain loops in the stated order, on ordinary and on nasty numbers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.kernels import lora, scalars
from tests.kernels.test_gram import KINDS, numbers

Float32 = NDArray[np.float32]

SHAPES = [(1, 1, 1), (1, 3, 5), (4, 2, 7), (5, 5, 33), (9, 1, lora.TILE + 3), (3, 8, 2 * lora.TILE)]


def add_in_order(left: Float32, right: Float32, scale: float, out: Float32) -> Float32:
    """Sum the products of each element in float32, from the first of the rank to the last."""
    total = np.zeros_like(out)
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k]
    return out + np.float32(scale) * total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_rows", "rank", "n_cols"), SHAPES)
def test_a_product_is_added_in_order(kind: str, n_rows: int, rank: int, n_cols: int) -> None:
    left, right = numbers(kind, (n_rows, rank), 0), numbers(kind, (rank, n_cols), 1)
    out = numbers(kind, (n_rows, n_cols), 2)
    with np.errstate(all="ignore"):
        expected = add_in_order(left, right, 0.3, out)
    lora.add_product(left, right, 0.3, np.full(4 * lora.TILE, np.nan, np.float32), out)
    assert np.array_equal(out, expected, equal_nan=True)


def test_rows_do_not_depend_on_their_block() -> None:
    left, right = numbers(KINDS[0], (13, 6), 0), numbers(KINDS[0], (6, 50), 1)
    sums = np.empty(4 * lora.TILE, np.float32)
    whole = np.zeros((13, 50), np.float32)
    lora.add_product(left, right, 1.0, sums, whole)
    for height in (1, 2, 3, 5):
        found = np.zeros_like(whole)
        for start in range(0, 13, height):
            part = np.ascontiguousarray(left[start : start + height])
            lora.add_product(part, right, 1.0, sums, found[start : start + height])
        assert np.array_equal(found, whole)


@pytest.mark.parametrize("n_cols", [1, 31, 32, 100])
def test_rows_get_the_norm_that_was_trained(n_cols: int) -> None:
    x = numbers(KINDS[0], (5, n_cols), 0)
    x[2] = 0
    magnitude = np.array([1, 2, 3, 0.5, 0], np.float32)
    norms = np.sqrt(np.square(x, dtype=np.float64).sum(axis=1)).astype(np.float32)
    factors = np.divide(magnitude, norms, out=np.ones(5, np.float32), where=norms > 0)
    expected = x * factors[:, None]
    lora.rescale_rows(magnitude, np.full(scalars.LANES, np.nan), x)
    assert np.allclose(x, expected, rtol=2e-7, atol=0)
    assert not x[2].any()
