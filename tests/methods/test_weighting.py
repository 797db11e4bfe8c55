"""Factors of task vectors against their definitions, and what each weighting promises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edgemerge.methods.weighting import WEIGHTINGS, factors

Float64 = NDArray[np.float64]
ROOT = math.sqrt(0.5)


def gram(*deltas: Any) -> Float64:
    rows = np.array(deltas, np.float64)
    return rows @ rows.T


def weigh(weighting: str, *deltas: Any, weights: Any = None) -> list[float]:
    weights = np.ones(len(deltas)) if weights is None else np.array(weights, np.float64)
    found: list[float] = factors(gram(*deltas), weights, weighting).tolist()
    return found


def twin(g: Float64, weights: Float64, weighting: str) -> list[float]:
    """One Gram matrix at a time, in Python's floats, as the definitions read."""
    n = len(g)
    norms = [math.sqrt(g[m, m]) for m in range(n)]
    active = [norm > 1e-12 * max(norms) for norm in norms]
    cos = [
        [
            max(-1.0, min(1.0, g[m, k] / (norms[m] * norms[k]))) if active[m] and active[k] else 0.0
            for k in range(n)
        ]
        for m in range(n)
    ]
    if weighting == "paper":
        share = max(0.0, cos[0][1])
        return [1.0 - share, share]
    total = sum(w for w, a in zip(weights, active, strict=True) if a)
    shares = [w / total if a and total else 0.0 for w, a in zip(weights, active, strict=True)]
    scale = 1.0
    if weighting == "agreement":
        energy = sum(
            shares[m] * max(0.0, cos[m][k]) * shares[k] for m in range(n) for k in range(n)
        )
        scale = 1.0 / math.sqrt(energy) if energy > 0 else 0.0
    if weighting == "stock" and sum(active) > 1:
        changed = [m for m in range(n) if active[m]]
        pairs = [cos[m][k] for m, k in itertools.combinations(changed, 2)]
        mean = sum(pairs) / len(pairs)
        divisor = 1.0 + (len(changed) - 1) * mean
        scale = len(changed) * mean / divisor if abs(divisor) >= 1e-6 else 0.0
    return [scale * share for share in shares]


X, Y, Z, NOTHING = [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]


@pytest.mark.parametrize(
    ("deltas", "weights", "wanted"),
    [
        ([X, X], None, [0.5, 0.5]),  # the same change twice is that change
        ([X, [3, 0, 0]], None, [0.5, 0.5]),
        ([X, Y], None, [ROOT, ROOT]),  # orthogonal: energy is kept
        ([X, NOTHING], None, [1, 0]),  # only one changed the tensor
        ([NOTHING, X], None, [0, 1]),
        ([NOTHING, NOTHING], None, [0, 0]),
        ([X, [-2, 0, 0]], None, [ROOT, ROOT]),  # opposite: a negative cosine counts as none
        ([X, [1, 1, 0]], None, [0.5 / math.sqrt(0.5 + 0.5 * ROOT)] * 2),
        ([X, Y], [3, 1], [0.75 / math.sqrt(0.625), 0.25 / math.sqrt(0.625)]),
        ([X, X], [3, 1], [0.75, 0.25]),
        ([X, NOTHING], [0.1, 7], [1, 0]),
        ([X, Y], [1, 0], [1, 0]),
        ([X, Y], [0, 0], [0, 0]),
        ([X, X, X], None, [1 / 3] * 3),
        ([X, Y, Z], None, [1 / math.sqrt(3)] * 3),
        ([X, X, Y], None, [1 / math.sqrt(5)] * 3),
        ([X, NOTHING, Y], None, [ROOT, 0, ROOT]),
        ([X], None, [1]),
        ([NOTHING], None, [0]),
    ],
)
def test_agreement(deltas: Any, weights: Any, wanted: list[float]) -> None:
    assert weigh("agreement", *deltas, weights=weights) == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        ([X, X], [0, 1]),
        ([X, Y], [1, 0]),
        ([Y, X], [1, 0]),  # the first expert, whichever that is: not symmetric
        ([NOTHING, X], [1, 0]),  # what only the second changed is lost
        ([X, [-1, 0, 0]], [1, 0]),
        ([X, [1, 1, 0]], [1 - ROOT, ROOT]),
    ],
)
def test_paper(deltas: Any, wanted: list[float]) -> None:
    assert weigh("paper", *deltas) == pytest.approx(wanted, abs=1e-15)
    assert weigh("paper", *deltas, weights=[5, 2]) == weigh("paper", *deltas)


@pytest.mark.parametrize(
    ("deltas", "weights", "wanted"),
    [
        ([X, X], None, [0.5, 0.5]),  # t = 1
        ([X, Y], None, [0, 0]),  # t = 0: nothing in common, the base
        ([X, [1, 1, 0]], None, [ROOT / (1 + ROOT)] * 2),  # t = 2c / (1 + c)
        ([X, [1, 1, 0]], [3, 1], [1.5 * ROOT / (1 + ROOT), 0.5 * ROOT / (1 + ROOT)]),
        ([X, [-1, 0, 0]], None, [0, 0]),  # its denominator vanishes
        ([X, [-1, 1, 0]], None, [-ROOT / (1 - ROOT)] * 2),  # away from the base, as published
        ([X, X, X], None, [1 / 3] * 3),
        ([X, X, Y], None, [(3 * (1 / 3) / (1 + 2 / 3)) / 3] * 3),
        ([X], None, [1]),
        ([NOTHING, NOTHING], None, [0, 0]),
        ([X, NOTHING, NOTHING], None, [1, 0, 0]),  # only one changed the tensor
        ([NOTHING, X], [3, 1], [0, 1]),
        ([X, NOTHING, X], None, [0.5, 0, 0.5]),
        ([X, NOTHING, [1, 1, 0]], [3, 5, 1], [1.5 * ROOT / (1 + ROOT), 0, 0.5 * ROOT / (1 + ROOT)]),
    ],
)
def test_stock(deltas: Any, weights: Any, wanted: list[float]) -> None:
    assert weigh("stock", *deltas, weights=weights) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("deltas", "weights", "wanted"),
    [
        ([X, Y], None, [0.5, 0.5]),
        ([X, [-1, 0, 0]], [1, 3], [0.25, 0.75]),
        ([X, NOTHING], None, [1, 0]),
        ([X, NOTHING, Y], [1, 5, 3], [0.25, 0, 0.75]),
        ([NOTHING, NOTHING], None, [0, 0]),
    ],
)
def test_linear(deltas: Any, weights: Any, wanted: list[float]) -> None:
    assert weigh("linear", *deltas, weights=weights) == pytest.approx(wanted, abs=1e-15)


def test_a_change_is_none_below_a_share_of_the_largest() -> None:
    assert weigh("agreement", [1, 0], [0, 1e-13]) == [1, 0]
    assert weigh("agreement", [1, 0], [0, 1e-11]) == pytest.approx([ROOT, ROOT])
    assert weigh("agreement", [1e-25, 0], [0, 1e-25]) == pytest.approx([ROOT, ROOT])


# -- what holds for all numbers ------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn, n: tuple[int, int] = (1, 5)) -> tuple[Float64, Float64]:
    """Deltas of any size, some of them zero or equal, and weights that are not negative."""
    count = draw(st.integers(*n))
    entries = st.floats(-1, 1).map(lambda x: round(x, 3))
    deltas = draw(arrays(np.float64, (count, 4), elements=entries))
    sizes = [10.0**e for e in draw(st.lists(st.integers(-4, 4), min_size=count, max_size=count))]
    weights = draw(arrays(np.float64, count, elements=st.floats(0, 3).map(lambda x: round(x, 2))))
    return deltas * np.array(sizes)[:, None], weights


@given(case=cases(), weighting=st.sampled_from(WEIGHTINGS))
def test_factors_are_their_definition(case: tuple[Float64, Float64], weighting: str) -> None:
    deltas, weights = case
    assume(weighting != "paper" or len(deltas) == 2)
    g = gram(*deltas)
    found = factors(g, weights, weighting)
    assert np.isfinite(found).all()
    if weighting == "stock":  # as ill-conditioned as it is published, next to its pole
        assume(twin_divisor(g) > 1e-3)
    assert found == pytest.approx(twin(g, weights, weighting), rel=1e-9, abs=1e-12)


def twin_divisor(g: Float64) -> float:
    norms = np.sqrt(np.diag(g))
    active = norms > 1e-12 * norms.max()
    g, norms, n = g[np.ix_(active, active)], norms[active], int(active.sum())
    if n < 2:
        return 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        cos = np.nan_to_num(g / np.outer(norms, norms))
    return abs(1.0 + (cos.sum() - np.trace(cos)) / n)


@given(case=cases())
def test_agreement_is_between_the_mean_and_root_n_times_the_mean(
    case: tuple[Float64, Float64],
) -> None:
    deltas, weights = case
    found = factors(gram(*deltas), weights, "agreement")
    active = (np.linalg.norm(deltas, axis=1) > 0) & (weights > 0)
    if not active.any():
        assert not found.any()
        return
    scale = found.sum()  # s, as the shares sum to 1
    assert 1 - 1e-12 <= scale <= math.sqrt(active.sum()) * (1 + 1e-12)
    assert (found >= 0).all()


@given(
    case=cases((2, 5)), weighting=st.sampled_from(["agreement", "stock", "linear"]), data=st.data()
)
def test_the_order_of_experts_does_not_matter(
    case: tuple[Float64, Float64], weighting: str, data: st.DataObject
) -> None:
    deltas, weights = case
    order = data.draw(st.permutations(range(len(deltas))))
    g = gram(*deltas)
    assume(weighting != "stock" or twin_divisor(g) > 1e-3)
    found = factors(g, weights, weighting)
    moved = factors(g[np.ix_(order, order)], weights[order], weighting)
    assert moved == pytest.approx(found[order], rel=1e-9, abs=1e-12)


@given(case=cases(), weighting=st.sampled_from(WEIGHTINGS), exponent=st.integers(-20, 20))
def test_the_unit_of_weights_does_not_matter(
    case: tuple[Float64, Float64], weighting: str, exponent: int
) -> None:
    """Exactly, for powers of two: a tensor's factors do not depend on its scale."""
    deltas, weights = case
    assume(weighting != "paper" or len(deltas) == 2)
    g = gram(*deltas)
    scaled = factors(g * 4.0**exponent, weights, weighting)
    assert np.array_equal(scaled, factors(g, weights, weighting))


@given(
    n=st.sampled_from([2, 3, 9]),
    weighting=st.sampled_from(WEIGHTINGS),
    seed=st.integers(0, 2**32),
)
def test_many_matrices_at_once_are_each_its_own(n: int, weighting: str, seed: int) -> None:
    """To the bit, so that rows have factors which do not depend on the height of blocks."""
    assume(weighting != "paper" or n == 2)
    rng = np.random.default_rng(seed)
    grams = np.stack([gram(*rng.standard_normal((n, 4))) for _ in range(7)])
    grams[2] = 0.0
    weights = rng.uniform(0, 2, n)
    together = factors(grams, weights, weighting)
    assert together.shape == (7, n)
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        part = factors(grams[start:stop], weights, weighting)
        assert part.tobytes() == together[start:stop].tobytes()
    for g, row in zip(grams, together, strict=True):
        assert factors(g, weights, weighting).tobytes() == row.tobytes()


@given(delta=arrays(np.float64, 4, elements=st.floats(-1, 1).map(lambda x: round(x, 3))))
def test_equal_changes_are_kept_whole(delta: Float64) -> None:
    for n in (2, 3, 5):
        found = weigh("agreement", *[delta] * n)
        wanted = [1 / n if delta.any() else 0.0] * n
        assert found == pytest.approx(wanted, rel=1e-14)
        assert weigh("stock", *[delta] * n) == pytest.approx(wanted, rel=1e-12)
