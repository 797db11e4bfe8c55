"""Kernels of the merge methods against their slow twins, on ordinary and on nasty numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.kernels import dare, della, linear, masks, select, slerp, ties
from tests import reference_methods as reference

Float32 = NDArray[np.float32]
Bits = NDArray[np.uint32]
EPS = 2.0**-24  # largest relative error of one rounding to float32
STEP = 2.0**-149  # least float32 above zero: one rounding below the normal range errs by half of it

SHAPES = [(1, 1), (7, 1), (1, 31), (5, 31), (1, 4097), (3, 4097)]
KINDS = ["normal", "zeros", "negative_zero", "denormal", "equal", "wide"]
CASES = [pytest.param(s, k, id=f"{s[0]}x{s[1]}-{k}") for s in SHAPES for k in KINDS]


@pytest.fixture(autouse=True)
def _wrapping() -> Iterator[None]:
    """With NUMBA_DISABLE_JIT the hashes run on NumPy scalars, which warn where integers wrap."""
    with np.errstate(over="ignore"):
        yield


def numbers(kind: str, n: int, seed: int) -> Float32:
    rng = np.random.default_rng([seed, n])
    normal = rng.standard_normal(n)
    if kind == "zeros":
        return np.zeros(n, np.float32)
    if kind == "negative_zero":
        return np.where(normal > 0, np.float32(-0.0), normal).astype(np.float32)
    if kind == "denormal":
        patterns = rng.integers(0, 0x00800000, n, np.uint32)
        return (patterns | rng.integers(0, 2, n, np.uint32) << np.uint32(31)).view(np.float32)
    if kind == "equal":
        return rng.choice(np.float32([-2, -1, -0.5, -0.0, 0, 0.5, 1, 2]), n)
    if kind == "wide":
        return (normal * 10.0 ** rng.uniform(-30, 30, n)).astype(np.float32)
    return normal.astype(np.float32)


def models(shape: tuple[int, int], kind: str, count: int) -> Float32:
    return np.stack([numbers(kind, shape[0] * shape[1], seed) for seed in range(count)])


def magnitudes(x: Float32) -> Bits:
    return x.view(np.uint32) & np.uint32(0x7FFFFFFF)


# -- sums ----------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_subtract_rounds_once(shape: tuple[int, int], kind: str) -> None:
    base, x = models(shape, kind, 2)
    want = reference.subtract(base, x)
    linear.subtract(base, x)
    assert np.array_equal(x.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_weighted_sum(shape: tuple[int, int], kind: str, count: int) -> None:
    x = models(shape, kind, count)
    weights = np.float32([0.6, -0.3, 1.7, 0.0, 1e-3])[:count]
    want = reference.weighted_sum(weights.tolist(), x)
    sizes = reference.weighted_sum(np.abs(weights).tolist(), np.abs(x))
    others = x[1:].copy()
    linear.weighted_sum(weights, x)
    # Each term is rounded once as a product and at most `count - 1` times in sums.
    assert (np.abs(x[0] - want) <= (count + 1) * (EPS * sizes + STEP)).all()
    assert np.array_equal(x[1:], others)


def test_weighted_sum_is_exact_where_float32_is() -> None:
    x = np.random.default_rng(0).integers(-100, 100, (3, 9000)).astype(np.float32)
    want = reference.weighted_sum([0.5, -2.0, 4.0], x)
    linear.weighted_sum(np.float32([0.5, -2.0, 4.0]), x)
    assert np.array_equal(x[0], want)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7, 1.9])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_add_scaled(shape: tuple[int, int], kind: str, scale: float) -> None:
    delta, base = models(shape, kind, 2)
    moved = base.copy()
    linear.add_scaled(delta, scale, moved)
    step = float(np.float32(scale)) * delta.astype(np.float64)
    want = base.astype(np.float64) + step
    assert (np.abs(moved - want) <= EPS * (2 * np.abs(step) + np.abs(want)) + 2 * STEP).all()
    if scale == 0.0:
        assert np.array_equal(moved, base)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_changes_are_added_as_in_three_steps(shape: tuple[int, int], kind: str, count: int) -> None:
    base, *experts = models(shape, kind, 1 + count)
    x = np.stack(experts)
    weights = np.float32([0.6, -0.3, 1.7])[:count]
    want, deltas = base.copy(), x.copy()
    for delta in deltas:
        linear.subtract(base, delta)
    linear.weighted_sum(weights, deltas)
    linear.add_scaled(deltas[0], 0.7, want)
    linear.add_changes(weights, 0.7, x, base)
    assert np.array_equal(base.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_dots_do_not_depend_on_blocks(shape: tuple[int, int], kind: str) -> None:
    a, b = models(shape, kind, 2)
    dots = np.full((shape[0], 3), np.nan)
    slerp.row_dots(a, b, shape[1], dots)
    pairs = [(a, a), (a, b), (b, b)]
    for dot, (x, y) in zip(dots.sum(0), pairs, strict=True):
        products = x.astype(np.float64) * y.astype(np.float64)
        bound = (a.size + 1) * 2.0**-53 * math.fsum(np.abs(products))
        assert abs(dot - math.fsum(products)) <= bound
    by_rows = np.full((shape[0], 3), np.nan)
    for i, (x, y) in enumerate(zip(a.reshape(shape), b.reshape(shape), strict=True)):
        slerp.row_dots(x.copy(), y.copy(), shape[1], by_rows[i : i + 1])
    assert np.array_equal(by_rows, dots)


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_norms_do_not_depend_on_blocks(shape: tuple[int, int], kind: str) -> None:
    x = numbers(kind, shape[0] * shape[1], 0)
    mask = np.random.default_rng(1).integers(0, 2, x.size, np.uint8)
    norms = np.full((shape[0], 2), np.nan)
    masks.row_norms(x, mask, shape[1], norms)
    sizes = np.abs(x.astype(np.float64))
    for norm, want in zip(
        norms.sum(0), (math.fsum(sizes), math.fsum(sizes[mask == 1])), strict=True
    ):
        assert norm == pytest.approx(want, rel=x.size * 2.0**-53, abs=0)
    by_rows = np.full((shape[0], 2), np.nan)
    for i, (row, kept) in enumerate(zip(x.reshape(shape), mask.reshape(shape), strict=True)):
        masks.row_norms(row.copy(), kept.copy(), shape[1], by_rows[i : i + 1])
    assert np.array_equal(by_rows, norms)


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_apply_mask(shape: tuple[int, int], kind: str, scale: float) -> None:
    x = numbers(kind, shape[0] * shape[1], 0)
    mask = np.random.default_rng(1).integers(0, 2, x.size, np.uint8)
    factor = np.float64(np.float32(scale))
    want = np.where(mask == 1, factor * x.astype(np.float64), 0.0).astype(np.float32)
    masks.apply_mask(mask, scale, x)
    assert np.array_equal(x, want)


@pytest.mark.parametrize("limit", [0x7F800000, 0x477FF000])
def test_count_beyond(limit: int) -> None:
    x = np.float32(
        [0, -0.0, 65504, 65519.996, 65520, -65520, 3e38, -np.inf, np.inf, np.nan, -np.nan]
    )
    x = np.concatenate([x, numbers("denormal", 40, 0)])
    count = np.full(1, -1, np.int64)
    masks.count_beyond(x, limit, count)
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
    beyond = ~np.isfinite(x) if limit == 0x7F800000 else ~np.isfinite(halves)
    assert count[0] == beyond.sum()


# -- sign election -------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_elect(shape: tuple[int, int], kind: str, normalize: bool) -> None:
    delta = models(shape, kind, 3)
    weights = np.float32([0.6, 0.25, 1.5])
    exact = reference.elect(weights.tolist(), normalize, delta)
    votes = reference.weighted_sum(weights.tolist(), delta)
    sizes = reference.weighted_sum(weights.tolist(), np.abs(delta))
    ties.elect(weights, normalize, np.empty((3, ties.TILE), np.float32), delta)
    bound = 8 * (EPS * sizes + STEP) * (4 if normalize else 1)  # the least divisor is 0.25
    clear = np.abs(votes) > bound
    clear |= sizes == 0
    assert (np.abs(delta[0] - exact.values) <= bound)[clear].all()
    if kind != "denormal":  # where rounding is relative, few votes hang on it
        assert clear.mean() > 0.99


@pytest.mark.parametrize("normalize", [False, True])
def test_elect_is_exact_on_small_integers(normalize: bool) -> None:
    """Many votes are zero, which counts as positive; an entry of zero agrees with no sign."""
    delta = np.random.default_rng(0).integers(-1, 2, (4, 9001)).astype(np.float32)
    weights = np.float32([1, 2, -1, 1])
    want = reference.elect(weights.tolist(), normalize, delta)
    ties.elect(weights, normalize, np.empty((3, ties.TILE), np.float32), delta)
    assert np.array_equal(delta[0], want.values.astype(np.float32))


def test_elect_gives_the_example_of_the_specification() -> None:
    delta = np.float32([[1, -1, 2, 0], [-1, 1, -1, 0]])
    ties.elect(np.float32([1, 1]), True, np.empty((3, ties.TILE), np.float32), delta)
    assert delta[0].tolist() == [1, 1, 2, 0]


def test_a_divisor_of_zero_is_one() -> None:
    """Weights 1 and -1 on opposite vectors agree, and their sum does not divide."""
    delta = np.float32([[3, -3], [-3, 3]])
    ties.elect(np.float32([1, -1]), True, np.empty((3, ties.TILE), np.float32), delta)
    assert delta[0].tolist() == [6, -6]


# -- exact selection -----------------------------------------------------------


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_counts_order_magnitudes(shape: tuple[int, int], kind: str) -> None:
    x = numbers(kind, shape[0] * shape[1], 0)
    high = np.zeros(1 << 15, np.uint32)
    for row in x.reshape(shape):
        select.count_high(row.copy(), high)
    assert np.array_equal(high, np.bincount(magnitudes(x) >> 16, minlength=1 << 15))
    for index in {int(magnitudes(x)[0] >> 16), 0, 0x7F80}:
        low = np.zeros(1 << 16, np.uint32)
        select.count_low(x, index, low)
        inside = magnitudes(x)[magnitudes(x) >> 16 == index] & 0xFFFF
        assert np.array_equal(low, np.bincount(inside, minlength=1 << 16))


def keep_between(low: int, high: int, x: Float32, ranges: tuple[int, int, int, int]) -> list[int]:
    """Twin of `mask_between` and `keep_ties`: one decision after the other."""
    kept, seen = [], {low: 0, high: 0}
    first = {low: ranges[:2], high: ranges[2:]} if low != high else {low: ranges[:2]}
    for magnitude in magnitudes(x).tolist():
        if magnitude in first:
            kept.append(int(first[magnitude][0] <= seen[magnitude] < first[magnitude][1]))
            seen[magnitude] += 1
        else:
            kept.append(int(low < magnitude < high))
    return kept


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_mask_between(shape: tuple[int, int], kind: str) -> None:
    x = numbers(kind, shape[0] * shape[1], 0)
    ascending = np.sort(magnitudes(x))
    n = x.size
    for low, high in [(0, n - 1), (n // 3, 2 * n // 3), (n // 2, n // 2)]:
        bounds = int(ascending[low]), int(ascending[high])
        ranges = (1, 3, 0, 2)
        cuts = np.array([bounds[0], *ranges[:2], bounds[1], *ranges[2:]], np.int64)
        seen, mask = np.zeros(2, np.int64), np.full(n, 9, np.uint8)
        for i in range(shape[0]):
            row = slice(i * shape[1], (i + 1) * shape[1])
            ties = np.full(2, -1, np.int64)
            select.mask_between(cuts, x[row], mask[row], ties)
            ties += seen
            select.keep_ties(cuts, seen, x[row], mask[row])
            assert np.array_equal(seen, ties)
        assert mask.tolist() == keep_between(*bounds, x, ranges)


# -- random masks --------------------------------------------------------------


def test_the_hash_is_splitmix64() -> None:
    """Published outputs for seed 1234567."""
    outputs = [reference.splitmix64(1234567 + i * reference.GAMMA) for i in range(1, 6)]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("density", [0.0, 1e-7, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("key", "first"), [(0, 0), (2**64 - 1, 5), (2**63 + 12345, 10**12)])
def test_bernoulli_mask(density: float, key: int, first: int) -> None:
    mask = np.full(4097, 9, np.uint8)
    threshold = np.uint64(math.ceil(density * 2**24))
    dare.bernoulli_mask(np.uint64(key), np.uint64(first), threshold, mask)
    assert np.array_equal(mask, reference.uniforms(key, 4097, first) < density)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_rank_mask(shape: tuple[int, int], kind: str, unbiased: bool) -> None:
    check_rank_mask(numbers(kind, shape[0] * shape[1], 0), shape, unbiased)


@pytest.mark.parametrize("n_infinite", [1, 100, 4097])
def test_rank_mask_of_differences_that_overflowed(n_infinite: int) -> None:
    x = numbers("normal", 4097, 0)
    x[-n_infinite:] = np.inf
    x[-n_infinite // 2 :] *= -1
    check_rank_mask(x, (1, 4097), unbiased=False)


def check_rank_mask(x: Float32, shape: tuple[int, int], unbiased: bool) -> None:
    given = x.copy()
    key, density, epsilon = 2**63 + 99, 0.5, 0.35
    scratch = np.full(4 * shape[1] + della.RADIX + 1, 0xA5A5A5A5, np.uint32)
    mask = np.full(x.size, 9, np.uint8)
    n = shape[1]
    for i in range(shape[0]):  # row by row, as if every block held one
        row = slice(i * n, (i + 1) * n)
        first = np.uint64(i * n)
        arguments = (density, epsilon, unbiased, scratch, x[row], mask[row])
        della.rank_mask(np.uint64(key), first, n, *arguments)
    p = reference.keep_probabilities(given.reshape(shape), density, epsilon).ravel()
    want = reference.uniforms(key, x.size) < p
    assert np.array_equal(mask, want)
    share = np.where(want & unbiased, p.astype(np.float32), np.float32(1))
    exact = given.astype(np.float64) / share.astype(np.float64)
    assert np.array_equal(x, exact.astype(np.float32))
