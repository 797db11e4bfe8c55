"""Kernels of deltas against plain loops, on ordinary and on nasty numbers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.kernels import deltas
from tests.kernels.test_gram import KINDS, numbers

Float32 = NDArray[np.float32]
SIZES = [0, 1, 31, 32, 33, 700]


def sum_in_lanes(squares: NDArray[np.float64]) -> float:
    """Add number i into partial sum i % 32, and fold these in halves."""
    lanes = [0.0] * deltas.LANES
    for i, square in enumerate(squares.tolist()):
        lanes[i % deltas.LANES] += square
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[k] + lanes[half + k] for k in range(half)]
    return lanes[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind == KINDS[0]])
@pytest.mark.parametrize("n", SIZES)
def test_squares_are_summed_in_lanes(kind: str, n: int) -> None:
    x, y = numbers(kind, (n,), 0), numbers(kind, (n,), 1)
    lanes, found = np.full(deltas.LANES, np.nan), np.full(2, np.nan)
    deltas.measure(x, lanes, found)
    assert found[0] == sum_in_lanes(np.square(x, dtype=np.float64))
    assert found[1] == (np.abs(x).max() if n else 0.0)
    deltas.squared_error(x, y, lanes, found[:1])
    assert found[0] == sum_in_lanes(np.square(x.astype(np.float64) - y))


@pytest.mark.parametrize("n", [1, 256, 300, 1000])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_sparse_values_get_their_places(n: int, density: float) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n).astype(np.float32)
    x[rng.random(n) >= density] = 0
    places = np.flatnonzero(x)
    counts = np.bincount(places // 256, minlength=-(-n // 256))
    ends = np.cumsum(counts).astype(np.int32)
    at, values = (places % 256).astype(np.uint8), x[places]
    for start, stop in ((0, n), (n // 3, n), (n // 2, n // 2 + 1), (0, 1)):
        first, last = start // 256, -(-stop // 256)
        begin = int(ends[first - 1]) if first else 0
        end = int(ends[last - 1])
        out = np.full(stop - start, np.nan, np.float32)
        deltas.scatter(
            np.ascontiguousarray(ends[first:last]),
            begin,
            start - 256 * first,
            np.ascontiguousarray(at[begin:end]),
            np.ascontiguousarray(values[begin:end]),
            out,
        )
        assert np.array_equal(out, x[start:stop])
