"""Every method on tensors in memory against its twin: settings, shapes, cuts, ties, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemerge.methods.table import METHODS
from tests.support.memory_stream import merge_in_memory
from tests.twins import methods as reference

Float32 = NDArray[np.float32]

# Settings of two experts and of the merge: what is silent here is the method's default.
PLAIN = ({"weight": 0.6}, {"weight": 0.3})
SETTINGS: dict[str, list[tuple[tuple[dict[str, Any], ...], dict[str, Any]]]] = {
    "linear": [
        (PLAIN, {}),
        (PLAIN, {"normalize": False}),
        (({"weight": 1.0}, {"weight": -0.4}), {}),
    ],
    "passthrough": [(({"scale": 1.0},), {}), (({"scale": -0.37},), {})],
    "slerp": [(({},), {"t": t}) for t in (0.0, 0.3, 1.0)],
    "task_arithmetic": [(PLAIN, {}), (PLAIN, {"normalize": True, "lambda": 0.7})],
}
PRUNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ties": ({"density": 0.5}, {"density": 0.21}),
    "dare_linear": ({"density": 0.5}, {"density": 0.7}),
    "dare_ties": ({"density": 0.5}, {"density": 1.0}),
    "della": ({"density": 0.5, "epsilon": 0.1}, {"density": 0.7, "epsilon": 0.25}),
    "della_linear": ({"density": 0.6}, {"density": 0.0}),
    "breadcrumbs": ({"density": 0.9}, {"density": 0.4, "gamma": 0.2}),
    "breadcrumbs_ties": ({"density": 0.5, "gamma": 0.0}, {"density": 0.7, "gamma": 0.4}),
}
GLOBALS: list[dict[str, Any]] = [
    {},
    {"rescale": True, "lambda": 1.3},
    {"rescale": "l1", "normalize": True},
    {"rescale": "expectation", "normalize": False},
    {"rescale": False},
]
SETTINGS |= {
    method: [(tuple({"weight": w, **own} for w, own in zip((0.6, 0.3), owns, strict=True)), options)
             for options in GLOBALS]
    for method, owns in PRUNED.items()
}  # fmt: skip
CASES = [
    pytest.param(method, owns, options, id=f"{method}-{i}")
    for method, choices in SETTINGS.items()
    for i, (owns, options) in enumerate(choices)
]
TOLERANCE = 4e-7  # of the tensor's largest magnitude: a few roundings to float32


def tensors(kind: str, shape: tuple[int, ...], count: int) -> list[Float32]:
    """A base and experts near it: differences of any size, of few sizes, or denormal."""
    rng = np.random.default_rng([len(kind), *shape])
    base = rng.standard_normal(shape).astype(np.float32)
    if kind == "grid":
        noise = [rng.integers(-3, 4, shape) / np.float32(8) for _ in range(count)]
        return [np.round(base * 8) / np.float32(8), *(np.round(base * 8) / 8 + n for n in noise)]
    if kind == "denormal":
        step = np.float32(2.0**-149)
        return [rng.integers(-500, 500, shape).astype(np.float32) * step for _ in range(count + 1)]
    cubes = [rng.standard_normal(shape) ** 3 for _ in range(count)]
    experts: list[NDArray[Any]] = [base + np.float32(0.1) * cube for cube in cubes]
    return [base, *experts]


def both(
    method: str,
    arrays: list[Float32],
    owns: tuple[dict[str, Any], ...],
    options: Mapping[str, Any],
    rows: int,
) -> tuple[Float32, reference.Merged]:
    arrays = [np.asarray(x, np.float32) for x in arrays]
    base = arrays[0] if METHODS[method].needs_base else None
    models = list(zip(arrays[1:], owns, strict=True))
    named: dict[str, Any] = {"seed": 7, "tensor": "blk.3.ffn_up.weight"}
    got = merge_in_memory(method, base, models, options, rows_per_block=rows, **named)
    return got, reference.merge_tensor(method, base, models, options, **named)


@pytest.mark.parametrize("kind", ["continuous", "grid"])
@pytest.mark.parametrize("shape", [(1,), (31,), (5, 1), (9, 31), (3, 4097), (2, 3, 8)])
@pytest.mark.parametrize(("method", "owns", "options"), CASES)
def test_method_equals_its_definition(
    method: str,
    owns: tuple[dict[str, Any], ...],
    options: dict[str, Any],
    shape: tuple[int, ...],
    kind: str,
) -> None:
    arrays = tensors(kind, shape, len(owns))
    got, want = both(method, arrays, owns, options, 2)
    scale = max(float(np.abs(want.values).max()), max(float(np.abs(x).max()) for x in arrays))
    assert reference.worst_error(got, want, scale) <= TOLERANCE


@pytest.mark.parametrize(("method", "owns", "options"), CASES)
def test_denormals_are_numbers(
    method: str, owns: tuple[dict[str, Any], ...], options: dict[str, Any]
) -> None:
    """Nothing is flushed to zero; each rounding errs by at most half of the least step."""
    got, want = both(method, tensors("denormal", (4, 65), len(owns)), owns, options, 3)
    step = 2.0**-149
    away = np.abs(got / np.float64(step) - want.values / step)
    elects = method in reference.ELECTS
    assert np.mean(away <= (20 if elects else 4)) >= (0.97 if elects else 1)


@pytest.mark.parametrize(("method", "owns", "options"), CASES)
def test_block_height_does_not_show(
    method: str, owns: tuple[dict[str, Any], ...], options: dict[str, Any]
) -> None:
    for kind in ("continuous", "grid"):
        arrays = tensors(kind, (13, 37), len(owns))
        results = [both(method, arrays, owns, options, rows)[0].tobytes() for rows in (13, 1, 5)]
        assert results[0] == results[1] == results[2]


# -- exact cuts ----------------------------------------------------------------


@st.composite
def task_vectors(draw: st.DrawFn) -> Float32:
    """A few rows of a few distinct magnitudes, zeros of both signs among them."""
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    levels = draw(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=4))
    signed = st.sampled_from([sign * x for x in levels for sign in (1.0, -1.0)])
    values = draw(st.lists(signed, min_size=rows * cols, max_size=rows * cols))
    return np.array(values, np.float32).reshape(rows, cols)


def kept_entries(method: str, delta: Float32, own: dict[str, Any], rows: int) -> NDArray[np.bool_]:
    """Which entries a pruning keeps, zeros apart: the base is 0 and the only weight 1."""
    base = np.zeros_like(delta)
    own = {"weight": 1.0, **own}
    return merge_in_memory(method, base, [(delta, own)], rows_per_block=rows) != 0


@settings(max_examples=150)
@given(delta=task_vectors(), density=st.floats(0, 0.999), rows=st.integers(1, 6))
def test_ties_keeps_the_largest_and_of_equal_ones_the_first(
    delta: Float32, density: float, rows: int
) -> None:
    kept = kept_entries("ties", delta, {"density": density}, rows)
    expected = reference.keep_largest(delta, density) & (density > 0) & (delta != 0)
    assert np.array_equal(kept, expected)
    if density > 0:  # and once more by sorted values alone
        k = max(1, int(density * delta.size))
        largest = np.sort(np.abs(delta[delta != 0]))[::-1][:k]
        assert np.array_equal(np.sort(np.abs(delta[kept]))[::-1], largest)


@settings(max_examples=150)
@given(
    delta=task_vectors(),
    density=st.floats(0, 0.999),
    gamma=st.floats(0, 1),
    rows=st.integers(1, 6),
)
def test_breadcrumbs_keeps_a_band_of_the_stable_order(
    delta: Float32, density: float, gamma: float, rows: int
) -> None:
    kept = kept_entries("breadcrumbs", delta, {"density": density, "gamma": gamma}, rows)
    assert np.array_equal(kept, reference.keep_band(delta, density, gamma) & (delta != 0))


@pytest.mark.parametrize("n", [100, 1000, 33333])
@pytest.mark.parametrize("density", [0.29, 0.1, 0.57])
def test_k_is_the_floor_in_float64(density: float, n: int) -> None:
    """int(0.29 * 100) is 28, not 29."""
    delta = np.random.default_rng(n).permutation(np.arange(1, n + 1)).astype(np.float32)
    kept = kept_entries("ties", delta, {"density": density}, 1)
    assert kept.sum() == int(density * n)


def test_breadcrumbs_without_outliers_keeps_the_largest() -> None:
    """gamma * n below 1 drops nothing at the top (mergekit before 0.1.5 dropped everything)."""
    delta = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    for gamma in (0.0, 0.01):
        kept = kept_entries("breadcrumbs", delta, {"density": 0.5, "gamma": gamma}, 1)
        assert np.array_equal(kept, reference.keep_largest(delta, 0.5))


# -- the small print of the specification --------------------------------------


def test_task_weights_that_cancel_are_not_normalised() -> None:
    base, x = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    models = [(x, {"weight": 1.0}), (2 * x, {"weight": -1.0})]
    merged = merge_in_memory("task_arithmetic", base, models, {"normalize": True})
    assert np.array_equal(merged, -x)


def test_an_unchanged_expert_dilutes_a_normalised_sum_but_no_election() -> None:
    base, x = np.zeros(4, np.float32), np.array([1, -2, 3, -4], np.float32)
    models = [(x, {"weight": 1.0}), (base, {"weight": 1.0})]
    options = {"normalize": True}
    assert np.array_equal(merge_in_memory("task_arithmetic", base, models, options), x / 2)
    assert np.array_equal(merge_in_memory("ties", base, models, options), x)


def test_only_the_weights_that_agree_divide_an_election() -> None:
    """Weights 1 and -1 on opposite vectors cancel: the divisor is 1, whatever the sum of all is."""
    base, x = np.zeros(4, np.float32), np.array([1, -2, 3, -4], np.float32)
    models = [(x, {"weight": 1.0}), (-x, {"weight": -1.0}), (base, {"weight": 2.0})]
    assert np.array_equal(merge_in_memory("ties", base, models), 2 * x)


def test_lambda_comes_after_normalize() -> None:
    base, x = np.zeros(4, np.float32), np.array([1, -2, 3, -4], np.float32)
    models = [(x, {"weight": 3.0}), (x, {"weight": 5.0})]
    for method in ("ties", "task_arithmetic"):
        merged = merge_in_memory(method, base, models, {"normalize": True, "lambda": 0.5})
        assert np.array_equal(merged, x / 2)


@pytest.mark.parametrize("cosine", [1.0, -1.0, 0.9996, 0.9994, 0.0])
@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_is_lerp_where_parallel(cosine: float, t: float) -> None:
    base = np.array([3, 0], np.float32)
    x = (5 * np.array([cosine, np.sqrt(1 - cosine**2)])).astype(np.float32)
    merged = merge_in_memory("slerp", base, [(x, {})], {"t": t}).astype(np.float64)
    lerp = (1 - t) * base.astype(np.float64) + t * x
    if abs(cosine) > 0.9995:
        assert merged == pytest.approx(lerp, abs=1e-6)
    else:  # on the sphere a half-way mean of equal norms keeps its norm
        assert np.linalg.norm(merged) > np.linalg.norm(lerp)
    unit = merge_in_memory("slerp", base / np.float32(3), [(x / np.float32(5), {})], {"t": t})
    if abs(cosine) < 0.9995:
        assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-6)


def test_slerp_of_zeros_is_lerp_or_sphere_without_division_by_zero() -> None:
    zeros, x = np.zeros(8, np.float32), np.ones(8, np.float32)
    for base, expert in ((zeros, x), (x, zeros), (zeros, zeros)):
        merged = merge_in_memory("slerp", base, [(expert, {})], {"t": 0.3})
        want = reference.slerp(base, expert, 0.3)
        assert np.isfinite(merged).all()
        assert merged == pytest.approx(want, abs=1e-6)


# -- random masks --------------------------------------------------------------


def random_mask(
    method: str, own: dict[str, Any], delta: Float32, **named: Any
) -> NDArray[np.bool_]:
    models = [(delta, {"weight": 1.0, **own})]
    options = {"rescale": False, "normalize": False}
    merged = merge_in_memory(method, np.zeros_like(delta), models, options, **named)
    return merged != 0


def test_masks_depend_on_seed_tensor_and_change() -> None:
    """On nothing else: an expert's mask in a later stage of a chain is another, as its change is."""
    ones = np.ones((64, 64), np.float32)
    own = {"density": 0.5}
    first = random_mask("dare_linear", own, ones, seed=1, tensor="a")
    assert np.array_equal(first, random_mask("dare_linear", own, ones, seed=1, tensor="a"))
    others = [
        random_mask("dare_linear", own, ones, seed=2, tensor="a"),
        random_mask("dare_linear", own, ones, seed=1, tensor="b"),
        random_mask("dare_linear", own, 2 * ones, seed=1, tensor="a"),
    ]
    for other in others:  # as independent as coins: equal in half of the places
        assert np.mean(first == other) == pytest.approx(0.5, abs=5 * 0.5 / 64)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_a_later_stage_of_a_chain_has_masks_of_its_own(method: str) -> None:
    """The same mask again would drop hardly anything."""
    base = np.zeros((100, 100), np.float32)
    delta = np.random.default_rng(0).standard_normal(base.shape).astype(np.float32)
    own, options = {"weight": 1.0, "density": 0.5}, {"rescale": False}
    first = merge_in_memory(method, base, [(delta, own)], options)
    second = merge_in_memory(method, base, [(first, own)], options)
    assert 0.22 < np.mean(second != 0) < 0.32


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_masks_do_not_depend_on_the_order_of_experts(method: str) -> None:
    base, *experts = tensors("continuous", (90, 33), 2)
    own = {"weight": 1.0, "density": 0.5}
    models = [(np.asarray(x, np.float32), own) for x in experts]
    first, second = (merge_in_memory(method, base, order) for order in (models, models[::-1]))
    assert np.array_equal(first, second)


def test_equal_experts_have_masks_of_their_own() -> None:
    zeros, ones = np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)
    models = [(ones, {"weight": w, "density": 0.5}) for w in (1.0, 2.0)]
    kept = merge_in_memory("dare_linear", zeros, models, {"rescale": False})
    assert [np.mean(kept == n) for n in range(4)] == pytest.approx([0.25] * 4, abs=5 * 0.5 / 64)


@pytest.mark.parametrize("density", [0.1, 0.6, 0.95])
def test_dare_keeps_the_density(density: float) -> None:
    n = 1 << 18
    mask = random_mask("dare_linear", {"density": density}, np.ones((512, 512), np.float32))
    sigma = (density * (1 - density) / n) ** 0.5
    assert mask.mean() == pytest.approx(density, abs=5 * sigma)
    deviation = mask.ravel() - density
    lag = float(np.mean(deviation[1:] * deviation[:-1])) / (density * (1 - density))
    assert abs(lag) < 5 / n**0.5


def test_expectation_and_l1_keep_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((256, 256)).astype(np.float32)
    base = np.zeros_like(delta)
    for method, own in (("dare_linear", {"density": 0.3}), ("della_linear", {"density": 0.3})):
        models = [(delta, {"weight": 1.0, **own})]
        merged = {
            rescale: merge_in_memory(method, base, models, {"rescale": rescale})
            for rescale in (True, "l1", "expectation", False)
        }
        assert np.array_equal(merged[True], merged["l1"])
        norm = float(np.abs(delta).sum(dtype=np.float64))
        assert np.abs(merged["l1"]).sum(dtype=np.float64) == pytest.approx(norm, rel=1e-6)
        assert np.abs(merged["expectation"]).sum(dtype=np.float64) == pytest.approx(norm, rel=0.02)
        kept = merged[False] != 0
        assert np.array_equal(merged[False][kept], delta[kept])


def test_della_keeps_by_rank() -> None:
    """Every column of a sorted row has its own probability; 2000 rows estimate it."""
    rows, cols, density, epsilon = 2000, 32, 0.5, 0.3
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (rows, cols))
    delta = signs * np.arange(1, cols + 1, dtype=np.float32)
    mask = random_mask("della_linear", {"density": density, "epsilon": epsilon}, delta)
    want = np.linspace(density - epsilon, density + epsilon, cols)
    sigma = np.sqrt(want * (1 - want) / rows)
    assert (np.abs(mask.mean(0) - want) < 5 * sigma).all()
    column = random_mask(
        "della_linear", {"density": density, "epsilon": epsilon}, delta.reshape(-1, 1)
    )
    assert column.mean() == pytest.approx(density, abs=5 * 0.5 / (rows * cols) ** 0.5)
