"""Kernels of the merge methods against their slow twins, on ordinary and on nasty numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.kernels import dare, della, gram, linear, norms, scalars, select, ties
from tests.twins import methods as reference

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
        return rng.choice(np.array([-2, -1, -0.5, -0.0, 0, 0.5, 1, 2], np.float32), n)
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
    subtract(base, x)
    assert np.array_equal(x.view(np.uint32), want.view(np.uint32))


def subtract(base: Float32, x: Float32) -> int:
    count = np.full(1, -1, np.int64)
    linear.subtract(base, x, count)
    return int(count[0])


def test_subtract_counts_what_is_not_finite() -> None:
    base = np.array([0, np.inf, np.nan, -3e38, 1, np.inf, 5], np.float32)
    x = np.array([0, 1, 1, 3e38, -np.inf, np.inf, 7], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert subtract(base, x) == 5
    assert subtract(base[:1], np.array([3e38], np.float32)) == 0


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_weighted_sum(shape: tuple[int, int], kind: str, count: int) -> None:
    x = models(shape, kind, count)
    weights = np.array([0.6, -0.3, 1.7, 0.0, 1e-3], np.float32)[:count]
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
    linear.weighted_sum(np.array([0.5, -2.0, 4.0], np.float32), x)
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
def test_deltas_are_added_as_in_three_steps(shape: tuple[int, int], kind: str, count: int) -> None:
    base, *experts = models(shape, kind, 1 + count)
    deltas = np.stack(experts)
    weights, scales = (
        np.array([0.6, -0.3, 1.7], np.float32)[:count],
        np.array([1.0, 1.9, 0.4], np.float32)[:count],
    )
    want, scaled = base.copy(), scales[:, None] * deltas
    assert scaled.dtype == np.float32
    linear.weighted_sum(weights, scaled)
    linear.add_scaled(scaled[0], 0.7, want)
    linear.add_deltas(weights, scales, 0.7, deltas, base)
    assert np.array_equal(base.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_changes_are_added_as_deltas(shape: tuple[int, int], kind: str, count: int) -> None:
    base, *experts = models(shape, kind, 1 + count)
    x = np.stack(experts)
    weights = np.array([0.6, -0.3, 1.7], np.float32)[:count]
    want, deltas = base.copy(), x.copy()
    for delta in deltas:
        subtract(base, delta)
    linear.add_deltas(weights, np.ones_like(weights), 0.7, deltas, want)
    limit, n_overflows = 0x3F800000, np.full(1, -1)
    linear.add_changes(weights, 0.7, x, limit, n_overflows, base)
    assert np.array_equal(base.view(np.uint32), want.view(np.uint32))
    assert n_overflows[0] == np.count_nonzero(~(np.abs(base) < 1))


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_dots_do_not_depend_on_blocks(shape: tuple[int, int], kind: str) -> None:
    a, b = models(shape, kind, 2)
    dots = np.full((shape[0], 3), np.nan)
    lanes = np.full(scalars.LANES, np.nan)
    gram.row_dots(a, b, shape[1], lanes, dots)
    pairs = [(a, a), (a, b), (b, b)]
    for dot, (x, y) in zip(dots.sum(0), pairs, strict=True):
        products = x.astype(np.float64) * y.astype(np.float64)
        bound = (a.size + 1) * 2.0**-53 * math.fsum(np.abs(products))
        assert abs(dot - math.fsum(products)) <= bound
    by_rows = np.full((shape[0], 3), np.nan)
    for i, (x, y) in enumerate(zip(a.reshape(shape), b.reshape(shape), strict=True)):
        gram.row_dots(x.copy(), y.copy(), shape[1], lanes, by_rows[i : i + 1])
    assert np.array_equal(by_rows, dots)


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_norms_do_not_depend_on_blocks(shape: tuple[int, int], kind: str) -> None:
    x = numbers(kind, shape[0] * shape[1], 0)
    found, lanes = np.full((shape[0], 2), np.nan), np.full(scalars.LANES, np.nan)
    norms.row_norms(x, shape[1], 1, lanes, found)
    assert np.isnan(found[:, 0]).all()
    for norm, row in zip(found[:, 1], x.reshape(shape), strict=True):
        want = math.fsum(np.abs(row.astype(np.float64)))
        assert norm == pytest.approx(want, rel=shape[1] * 2.0**-53, abs=0)
        alone = np.empty((1, 1))
        norms.row_norms(row.copy(), shape[1], 0, lanes, alone)
        assert alone[0, 0] == norm


@pytest.mark.parametrize("n_cols", [1, 31, 32, 33, 100])
def test_a_norm_is_added_in_lanes_and_these_in_halves(n_cols: int) -> None:
    x = numbers("wide", n_cols, 0)
    lanes = np.zeros(scalars.LANES)
    for i, value in enumerate(x.tolist()):
        lanes[i % scalars.LANES] += abs(value)
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    found = np.empty((1, 1))
    norms.row_norms(x, n_cols, 0, np.empty(scalars.LANES), found)
    assert found[0, 0] == lanes[0]


@pytest.mark.parametrize("limit", [0x7F800000, 0x477FF000])
def test_count_beyond(limit: int) -> None:
    x = np.array(
        [0, -0.0, 65504, 65519.996, 65520, -65520, 3e38, -np.inf, np.inf, np.nan, -np.nan],
        np.float32,
    )
    x = np.concatenate([x, numbers("denormal", 40, 0)])
    count = np.full(1, -1, np.int64)
    norms.count_overflows(x, limit, count)
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
    overflows = ~np.isfinite(x) if limit == 0x7F800000 else ~np.isfinite(halves)
    assert count[0] == overflows.sum()


# -- sign election -------------------------------------------------------------


def elect(weights: Float32, normalize: bool, delta: Float32) -> Float32:
    """Move a base of zeros by all that is elected."""
    base = np.zeros(delta.shape[1], np.float32)
    scratch = np.full((3, ties.TILE), np.nan, np.float32)
    ties.elect(weights, np.ones_like(weights), normalize, 1.0, scratch, delta, base)
    return base


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_elect(shape: tuple[int, int], kind: str, normalize: bool) -> None:
    delta = models(shape, kind, 3)
    weights = np.array([0.6, 0.25, 1.5], np.float32)
    exact = reference.elect(weights.tolist(), normalize, delta)
    votes = reference.weighted_sum(weights.tolist(), delta)
    sizes = reference.weighted_sum(weights.tolist(), np.abs(delta))
    elected = elect(weights, normalize, delta)
    bound = 8 * (EPS * sizes + STEP) * (4 if normalize else 1)  # the least divisor is 0.25
    clear = np.abs(votes) > bound
    clear |= sizes == 0
    assert (np.abs(elected - exact.values) <= bound)[clear].all()
    if kind != "denormal":  # where rounding is relative, few votes hang on it
        assert clear.mean() > 0.99


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_election_rescales_and_moves_in_two_roundings(
    shape: tuple[int, int], kind: str, normalize: bool
) -> None:
    base, *experts = models(shape, kind, 4)
    weights, scales = np.array([0.6, 0.25, 1.5], np.float32), np.array([1.0, 1.7, 0.9], np.float32)
    scaled = scales[:, None] * np.stack(experts)
    want = base + np.float32(0.7) * elect(weights, normalize, scaled)
    scratch, delta = np.empty((3, ties.TILE), np.float32), np.stack(experts)
    ties.elect(weights, scales, normalize, 0.7, scratch, delta, base)
    assert want.dtype == np.float32
    assert np.array_equal(base, want)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_two_are_elected_as_among_three(shape: tuple[int, int], kind: str, normalize: bool) -> None:
    """A third that is zero everywhere agrees with no sign and has no part in a vote."""
    two = models(shape, kind, 2)
    three = np.stack([*two, np.zeros_like(two[0])])
    weights = np.array([0.6, -0.25, 1.5], np.float32)
    want = elect(weights, normalize, three)
    assert np.array_equal(elect(weights[:2], normalize, two), want)


@pytest.mark.parametrize("normalize", [False, True])
def test_elect_is_exact_on_small_integers(normalize: bool) -> None:
    """Many votes are zero, which counts as positive; an entry of zero agrees with no sign."""
    delta = np.random.default_rng(0).integers(-1, 2, (4, 9001)).astype(np.float32)
    weights = np.array([1, 2, -1, 1], np.float32)
    want = reference.elect(weights.tolist(), normalize, delta)
    assert np.array_equal(elect(weights, normalize, delta), want.values.astype(np.float32))


def test_elect_gives_the_example_of_the_specification() -> None:
    delta = np.array([[1, -1, 2, 0], [-1, 1, -1, 0]], np.float32)
    assert elect(np.array([1, 1], np.float32), True, delta).tolist() == [1, 1, 2, 0]


def test_a_divisor_of_zero_is_one() -> None:
    """Weights 1 and -1 on opposite vectors agree, and their sum does not divide."""
    delta = np.array([[3, -3], [-3, 3]], np.float32)
    assert elect(np.array([1, -1], np.float32), True, delta).tolist() == [6, -6]


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


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_ties_are_counted_and_found(shape: tuple[int, int], kind: str) -> None:
    x = numbers(kind, shape[0] * shape[1], 0)
    first, second = (int(magnitudes(x)[i]) for i in (0, x.size // 2))
    counts, index = np.full(2, -1, np.int64), np.full(1, -1, np.int64)
    select.count_ties(first, second, x, counts)
    for magnitude, count in zip((first, second), counts, strict=True):
        places = np.flatnonzero(magnitudes(x) == magnitude)
        assert count == places.size
        for number in {0, places.size // 2, places.size - 1}:
            select.find_tie(magnitude, number, x, index)
            assert index[0] == places[number]


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_keep_between(shape: tuple[int, int], kind: str) -> None:
    given = numbers(kind, shape[0] * shape[1], 0)
    ascending = np.sort(magnitudes(given)).astype(np.int64)
    n = given.size
    for low, high in [(0, n - 1), (n // 3, 2 * n // 3), (n // 2, n // 2)]:
        for least in (ascending[low], ascending[low] + 1):
            for most in (ascending[high] - 1, ascending[high], 0x7FFFFFFF):
                x = given.copy()
                select.keep_between(least, most, x)
                is_kept = (least <= magnitudes(given)) & (magnitudes(given) <= most)
                want = np.where(is_kept, given, np.float32(0))
                assert np.array_equal(x.view(np.uint32), want.view(np.uint32))


# -- random drops --------------------------------------------------------------


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
def test_drop_random(density: float, key: int, first: int) -> None:
    given = numbers("wide", 4097, 0)
    x, threshold = given.copy(), np.uint64(math.ceil(density * 2**24))
    dare.drop_random(np.uint64(key), np.uint64(first), threshold, x)
    kept = reference.uniforms(key, 4097, first) < density
    assert np.array_equal(x, np.where(kept, given, np.float32(0)))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_drop_by_rank(shape: tuple[int, int], kind: str, unbiased: bool) -> None:
    check_drop_by_rank(numbers(kind, shape[0] * shape[1], 0), shape, unbiased)


@pytest.mark.parametrize("n_infinite", [1, 100, 4097])
def test_drop_by_rank_of_differences_that_overflowed(n_infinite: int) -> None:
    x = numbers("normal", 4097, 0)
    x[-n_infinite:] = np.inf
    x[-n_infinite // 2 :] *= -1
    check_drop_by_rank(x, (1, 4097), unbiased=False)


def check_drop_by_rank(x: Float32, shape: tuple[int, int], unbiased: bool) -> None:
    given = x.copy()
    key, density, epsilon = 2**63 + 99, 0.5, 0.35
    scratch = np.full(5 * shape[1] + della.RADIX + 1, 0xA5A5A5A5, np.uint32)
    n = shape[1]
    for i in range(shape[0]):  # row by row, as if every block held one
        row = slice(i * n, (i + 1) * n)
        first = np.uint64(i * n)
        della.drop_by_rank(np.uint64(key), first, n, density, epsilon, unbiased, scratch, x[row])
    p = reference.keep_probabilities(given.reshape(shape), density, epsilon).ravel()
    kept = reference.uniforms(key, x.size) < p
    share = p.astype(np.float32) if unbiased else np.ones(x.size, np.float32)
    exact = np.where(kept, given.astype(np.float64) / share.astype(np.float64), 0.0)
    assert np.array_equal(x, exact.astype(np.float32))
