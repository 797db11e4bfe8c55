"""Kernels of Arcee Fusion, SCE, RAM, NearSwap and of columns, on ordinary and on nasty numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemerge.kernels import fusion, gram, nearswap, ram, scalars, sce
from tests.kernels.test_gram import KINDS, numbers

Float32 = NDArray[np.float32]


@given(x=st.floats(-700, 0))
def test_exp_is_within_a_few_last_bits(x: float) -> None:
    assert scalars.exp(x) == pytest.approx(math.exp(x), rel=1e-15)


@given(x=st.floats(1e-9, 1e9))
def test_log_is_within_a_few_last_bits(x: float) -> None:
    assert scalars.log(x) == pytest.approx(math.log(x), rel=3e-16, abs=2e-16)


def test_exp_of_what_is_far_below_zero_is_zero() -> None:
    assert [scalars.exp(x) for x in (0.0, -701.0, -6.8e38)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_those_of_long_doubles(kind: str) -> None:
    x, base = (numbers(kind, (3, 70), seed) for seed in (0, 1))
    found = np.full(3, np.nan)
    fusion.row_divergences(x.ravel(), base.ravel(), 70, np.full(scalars.LANES, np.nan), found)

    def softmax(rows: Float32) -> NDArray[np.longdouble]:
        wide = rows.astype(np.longdouble)
        powers = np.exp(wide - wide.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True) + np.longdouble(1e-8)

    p, q = softmax(x), softmax(base)
    want = np.maximum((p * np.log(p / q)).sum(axis=1), 0)
    assert found == pytest.approx(want.astype(np.float64), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_important_is_taken(kind: str) -> None:
    x, base = (numbers(kind, (2 * 33,), seed) for seed in (0, 1))
    found = np.full(66, np.nan, np.float32)
    fusion.importances(x, base, 33, np.array([0.5, 2.0]), found)
    with np.errstate(over="ignore"):
        want = np.abs(x - base).astype(np.float64).reshape(2, 33) * [[0.5], [2.0]]
        assert np.array_equal(found, want.ravel().astype(np.float32))
    bound = float(np.median(found))
    merged = base.copy()
    fusion.take_important(bound, found, x, merged)
    assert np.array_equal(merged, np.where(found >= bound, base + (x - base), base))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_variances_are_rounded_once(kind: str, count: int) -> None:
    delta = numbers(kind, (count, 50))
    delta[:, 7] = delta[0, 7]
    found = np.full(50, np.nan, np.float32)
    sce.variances(delta, found)
    exact = delta.astype(np.longdouble).var(axis=0).astype(np.float64)
    with np.errstate(over="ignore"):
        assert found == pytest.approx(exact.astype(np.float32), rel=2e-7, abs=2.0**-149)
    assert found[7] == 0
    marked = delta.copy()
    sce.keep_marked(found, marked)
    assert np.array_equal(marked, np.where(found != 0, delta, np.float32(0)))


def test_a_sum_of_zero_elects_what_is_positive() -> None:
    delta = np.array([[1, -1, 0, 3], [-1, 1, 0, -1]], np.float32)
    base = np.zeros(4, np.float32)
    sce.add_agreeing(np.array([0.75, 0.25], np.float32), delta, base)
    assert base.tolist() == [1, 1, 0, 3]


def test_little_weight_that_agrees_is_not_enlarged_without_end() -> None:
    delta = np.array([[1], [-3]], np.float32)
    base = np.zeros(1, np.float32)
    sce.add_agreeing(np.array([1, 1e-8], np.float32), delta, base)
    assert base[0] == pytest.approx(-3 * 1e-8 / 1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_counted_and_averaged(kind: str, count: int) -> None:
    delta = numbers(kind, (count, 60))
    least = float(np.median(np.abs(delta)))
    changed = np.abs(delta) > np.float32(least)
    together = changed.sum(axis=0)
    counts = np.ones(2 * count, np.uint32)
    ram.count_changes(least, delta, counts)
    want = [np.sum(changed & alone, axis=1) for alone in (together > 1, together == 1)]
    assert np.array_equal(counts, 1 + np.concatenate(want))
    base = np.zeros(60, np.float32)
    factors = np.linspace(1, 2, count, dtype=np.float32)
    ram.add_changes(least, factors, delta, base)
    wide = np.where(changed, delta.astype(np.float64), 0)
    scales = np.where(together == 1, factors[:, None], 1 / np.maximum(together, 1))
    sizes = np.abs(wide * scales).sum(axis=0)
    assert (np.abs(base - (wide * scales).sum(axis=0)) <= 1e-6 * sizes + 2.0**-148).all()


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_near_elements_are_swapped(kind: str, threshold: float) -> None:
    x, base = (numbers(kind, (90,), seed) for seed in (0, 1))
    a, b = base.astype(np.float64), x.astype(np.float64)
    weight = np.clip(threshold / np.maximum(np.abs(a - b), 1e-6), 0, 1)
    want = weight * b + (1 - weight) * a
    merged = base.copy()
    nearswap.swap_near(threshold, x, merged)
    assert (np.abs(merged - want) <= 4e-7 * np.maximum(np.abs(a), np.abs(b)) + 2.0**-148).all()


def test_columns_are_summed_row_after_row() -> None:
    x = numbers("normal", (2, 7 * 5))
    whole, parts = np.zeros((3, 5)), np.zeros((3, 5))
    gram.add_column_dots(x[0], x[1], whole)
    for start, stop in ((0, 1), (1, 5), (5, 7)):
        a, b = (np.ascontiguousarray(y[start * 5 : stop * 5]) for y in x)
        gram.add_column_dots(a, b, parts)
    assert whole.tobytes() == parts.tobytes()
    a, b = x.reshape(2, 7, 5).astype(np.float64)
    assert whole == pytest.approx(np.stack([(a * a).sum(0), (a * b).sum(0), (b * b).sum(0)]))
    factors = numbers("normal", (2, 5), 3)
    wanted = factors[0] * x[0].reshape(7, 5) + factors[1] * x[1].reshape(7, 5)
    gram.combine_columns(factors, x)
    assert np.array_equal(x[0].reshape(7, 5), wanted)
