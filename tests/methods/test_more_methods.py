"""The methods without pruning of single task vectors against their twins: settings, shapes, block heights."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.methods.coefficients import karcher_factors, multislerp_factors, nuslerp_factors
from edgemerge.methods.table import METHODS
from edgemerge.native.kernel import Kernel
from edgemerge.types import InputTensor, TensorJob, TensorSpec
from tests.support.memory_stream import MemoryStream, merge_in_memory
from tests.twins import covariance, directions, elements

Float32 = NDArray[np.float32]
TWINS = directions.TWINS | elements.TWINS | covariance.TWINS
TOLERANCE = 4e-7  # of the tensor's largest magnitude: a few roundings to float32

# Method, models, whether there is a base, settings.
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
CHOICES: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("model_stock", 2, True, {}),
    ("model_stock", 3, True, {"filter_wise": True}),
    *[
        ("nuslerp", 2, based, settings)
        for based in (False, True)
        for settings in ({}, {"nuslerp_flatten": False}, COLUMNS)
    ],
    ("multislerp", 3, False, {}),
    ("multislerp", 2, True, {"normalize_weights": False}),
    ("multislerp", 1, True, {}),
    ("karcher", 2, False, {}),
    ("karcher", 4, False, {"max_iter": 999.0, "tol": 1e-10}),
    ("covariance", 2, True, {}),
    ("covariance", 3, True, {"columns": 5.0}),
    ("covariance", 2, True, {"columns": 100.0, "ridge": 2.0}),
    ("covariance", 1, True, {}),
    ("lines", 2, True, {}),
    ("lines", 1, True, {"alpha": -0.2}),
    ("sce", 3, True, {}),
    ("sce", 2, True, {"select_topk": 0.4}),
    ("sce", 1, True, {"select_topk": 0.5}),
    ("sce", 2, True, {"select_topk": 0.0}),
    ("ram", 3, True, {}),
    ("ram", 1, True, {"epsilon": 0.1}),
    ("ramplus_tl", 3, True, {"epsilon": 0.05}),
    ("ramplus_tl", 2, True, {"epsilon": 0.2, "r": 0.5, "alpha": 3.0}),
    ("arcee_fusion", 1, True, {}),
    ("nearswap", 1, True, {"t": 0.01}),
    ("nearswap", 1, True, {"t": 0.0}),
]
CASES = [pytest.param(*choice, id=f"{choice[0]}-{i}") for i, choice in enumerate(CHOICES)]
WEIGHTS = (0.6, 0.3, 0.5, 0.1)


def tensors(kind: str, shape: tuple[int, ...], count: int) -> list[Float32]:
    """A base and models near it: differences of any size, of few sizes, or none in all but one."""
    rng = np.random.default_rng([len(kind), *shape])
    base = rng.standard_normal(shape)
    if kind == "grid":
        base = np.round(base * 8) / 8
        models = [base + rng.integers(-3, 4, shape) / 8 for _ in range(count)]
    elif kind == "one":
        models = [base] * (count - 1) + [base + 0.1 * rng.standard_normal(shape)]
    else:
        models = [base + 0.1 * rng.standard_normal(shape) ** 3 for _ in range(count)]
    return [np.asarray(x, np.float32) for x in (base, *models)]


def both(
    method: str, base: Float32 | None, models: list[Float32], options: dict[str, Any], rows: int
) -> tuple[Float32, NDArray[np.float64]]:
    weighted = "weight" in METHODS[method].parameters_of(model=True)
    owns = [{"weight": w} if weighted else {} for w in WEIGHTS[: len(models)]]
    got = merge_in_memory(
        method, base, list(zip(models, owns, strict=True)), options, rows_per_block=rows
    )
    weights = [WEIGHTS[: len(models)]] if weighted else []
    return got, TWINS[method](base, models, *weights, **options)


@pytest.mark.parametrize("kind", ["continuous", "grid", "one"])
@pytest.mark.parametrize("shape", [(1,), (31,), (5, 1), (9, 31), (3, 4097), (2, 3, 8)])
@pytest.mark.parametrize(("method", "count", "based", "options"), CASES)
def test_method_equals_its_definition(
    method: str,
    count: int,
    based: bool,
    options: dict[str, Any],
    shape: tuple[int, ...],
    kind: str,
) -> None:
    base, *models = tensors(kind, shape, count)
    got, want = both(method, base if based else None, models, options, 2)
    seen: list[Any] = [want, base, *models]
    scale = max(float(np.abs(x).max()) for x in seen)
    sums = 10 if method == "covariance" else 1  # its float32 sums are under an inverse
    assert np.abs(got - want).max() <= sums * TOLERANCE * scale


@pytest.mark.parametrize(("method", "count", "based", "options"), CASES)
def test_block_height_does_not_show(
    method: str, count: int, based: bool, options: dict[str, Any]
) -> None:
    for kind in ("continuous", "grid"):
        base, *models = tensors(kind, (13, 37), count)
        results = {
            both(method, base if based else None, models, options, rows)[0].tobytes()
            for rows in (13, 1, 5)
        }
        assert len(results) == 1


@pytest.mark.parametrize(("method", "count", "based", "options"), CASES)
def test_models_equal_to_the_base_leave_it(
    method: str, count: int, based: bool, options: dict[str, Any]
) -> None:
    base = tensors("continuous", (5, 33), 1)[0]
    merged, _ = both(method, base if based else None, [base] * count, options, 2)
    scale = sum(WEIGHTS[:count]) if options.get("normalize_weights") is False and not based else 1.0
    assert merged == pytest.approx(scale * base, rel=3e-7)


# -- the small print -------------------------------------------------------------------------------


def test_the_passes_that_are_planned_are_those_that_are_made() -> None:
    for method, count, based, options in CHOICES:
        row, spec = METHODS[method], TensorSpec("output.weight", (4, 4), "F32", 64)
        own = InputTensor(1, spec, {"weight": 1.0})
        job = TensorJob(
            spec,
            method,
            InputTensor(0, spec) if based else None,
            (own,) * count,
            {**row.defaults(model=False), **options},
            4,
            1,
        )
        base, *models = tensors("continuous", (4, 4), count)
        made = count_passes(method, base if based else None, models, options)
        planned = 1 if row.copies(job) else row.passes(job)
        assert made == planned, (method, options)


def count_passes(
    method: str, base: Float32 | None, models: list[Float32], options: dict[str, Any]
) -> int:
    class Counting(MemoryStream):
        made = 0

        def blocks(self) -> Any:
            self.made += 1
            return super().blocks()

    pairs = [(x, {"weight": 1.0}) for x in models]
    stream = Counting(method, base, pairs, options, 2, 0, "")
    for _ in METHODS[method].blocks(stream):
        pass
    return stream.made


def test_karcher_of_a_thousand_steps_ends_in_a_moment() -> None:
    """A public card asks for 999 steps of 1e-10 on 40 layers, which mergekit did not end in minutes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 400)) + 0.3
    started = time.process_time()
    for _ in range(9):  # tensors of one layer
        factors = karcher_factors(x @ x.T, 999, 1e-10)
    assert time.process_time() - started < 40 / 40
    mean = factors @ x
    want = directions.karcher(None, list(x), max_iter=999, tol=1e-10)
    assert mean == pytest.approx(want, rel=1e-9)


def test_karcher_stands_what_is_equal_opposite_or_zero() -> None:
    a = np.array([3.0, 4.0])
    for rows, want in (
        ([a, a, a], a),
        ([a, 3 * a], 2 * a),
        ([a, -a], a),  # no mean: the first one's direction
        ([a, 0 * a], a / 2),  # no direction, but a length
        ([0 * a, 0 * a], 0 * a),
    ):
        x = np.array(rows)
        for tol in (1e-5, 0.0):
            assert karcher_factors(x @ x.T, 10, tol) @ x == pytest.approx(want, abs=1e-12)


def test_opposite_vectors_are_interpolated_along_a_line() -> None:
    """The rounding errors of a cosine of -1 would be enlarged a hundred million times."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = rng.standard_normal(100)
        square = float(x @ x)
        product = -square * (1 - 2.0**-53)
        assert nuslerp_factors(square, product, square, 0.3) == (0.7, 0.3)


def test_multislerp_of_directions_that_cancel_is_a_line_or_refused() -> None:
    a, b = np.array([3.0, 4.0]), np.array([-6.0, -8.0])
    x = np.array([a, b])
    assert multislerp_factors(x @ x.T, np.array([0.5, 0.5]), 1e-8).tolist() == [0.5, 0.5]
    turn = np.array([[-0.5, -(0.75**0.5)], [0.75**0.5, -0.5]])
    third = np.array([a, turn @ a, turn @ turn @ a])
    with pytest.raises(MismatchError, match="directions of the models cancel in multislerp"):
        multislerp_factors(third @ third.T, np.full(3, 1 / 3), 1e-8)
    models = [(v.astype(np.float32), {"weight": 1.0}) for v in (np.ones(3), -np.ones(3), 0 * a[:1])]
    models[2] = (np.zeros(3, np.float32), {"weight": 1.0})
    with pytest.raises(MismatchError) as caught:
        merge_in_memory("multislerp", None, models, tensor="blk.0.ffn_up.weight")
    assert caught.value.tensor == "blk.0.ffn_up.weight"


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("factor", [-3.0, -0.7])
def test_multislerp_takes_no_rounding_for_a_direction(factor: float, eps: float) -> None:
    rng = np.random.default_rng(0)
    half = np.array([0.5, 0.5])
    for n in range(2, 60):
        a = rng.standard_normal(n)
        x = np.array([a, factor * a])
        assert multislerp_factors(x @ x.T, half, eps).tolist() == [0.5, 0.5]
        x[1] += 1e-5 * rng.standard_normal(n)  # a direction that dot products tell
        found = multislerp_factors(x @ x.T, half, eps) @ x
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-2)


def test_multislerp_stands_zeros_with_any_eps() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    for eps in (1e-8, 0.0):
        found = multislerp_factors(x @ x.T, np.array([0.5, 0.5]), eps) @ x
        assert found == pytest.approx([1.5, 2.0], rel=1e-6)
    assert multislerp_factors(x @ x.T, np.array([0.0, 1.0]), 0.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("method", "name"), [("karcher", "tol"), ("multislerp", "eps")])
def test_a_norm_below_zero_is_refused(method: str, name: str) -> None:
    models: list[Any] = [(np.ones(4, np.float32), {"weight": 1.0})] * 2
    for value in (0.0, -1e-5):
        stream = MemoryStream(method, None, models, {name: value}, 1, 0, "output.weight")
        if not value:
            METHODS[method].check(stream.job)
            continue
        with pytest.raises(RecipeError, match=f"{name} must not be below 0, as it is a norm"):
            METHODS[method].check(stream.job)


def test_multislerp_refuses_weights_that_sum_to_zero() -> None:
    spec = TensorSpec("output.weight", (4, 4), "F32", 64)
    experts = tuple(InputTensor(i, spec, {"weight": w}) for i, w in enumerate((1.0, -1.0)))
    settings = METHODS["multislerp"].defaults(model=False)
    with pytest.raises(RecipeError, match="normalize_weights: false"):
        METHODS["multislerp"].check(TensorJob(spec, "multislerp", None, experts, settings, 4, 1))


def test_model_stock_goes_away_from_models_that_disagree() -> None:
    """A negative cosine makes a negative step, as published."""
    base = np.zeros(2, np.float32)
    models: list[Any] = [(np.array(x, np.float32), {}) for x in ([1, 0], [-1, 1])]
    merged = merge_in_memory("model_stock", base, models)
    cosine = -(0.5**0.5)
    t = 2 * cosine / (1 + cosine)
    assert merged == pytest.approx(t * np.array([0, 0.5]), rel=1e-6)


def test_sce_counts_in_float32_as_mergekit_does() -> None:
    """0.29 * 100 is 28.999... in float64 and 29 in float32."""
    deltas = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    models: list[Any] = [(x, {}) for x in deltas]
    merged = merge_in_memory("sce", np.zeros(100, np.float32), models, {"select_topk": 0.29})
    assert np.count_nonzero(merged) == 29


def test_ram_averages_over_those_that_changed_an_element() -> None:
    base = np.zeros(4, np.float32)
    models: list[Any] = [
        (np.array(x, np.float32), {}) for x in ([3, 0, 1, 1e-6], [1, 2, 1, 0], [2, 0, 0, 0])
    ]
    assert merge_in_memory("ram", base, models).tolist() == [2, 2, 1, 0]
    merged = merge_in_memory("ramplus_tl", base, models, {"r": 1.0, "alpha": 0.5})
    assert merged.tolist() == [2, 3, 1, 0]


def test_arcee_fusion_has_exact_quantiles_of_large_tensors() -> None:
    """mergekit draws a million elements of these anew each time."""
    base, x = tensors("continuous", (1500, 700), 1)
    got, want = both("arcee_fusion", base, [x], {}, 400)
    assert np.mean(got != base) == pytest.approx(np.mean(want != base), abs=2e-6)
    assert np.mean(np.abs(got - want) > 1e-6) <= 2e-6


@pytest.mark.parametrize(("method", "count", "based", "options"), CASES)
def test_kernels_that_are_called_are_named(
    method: str, count: int, based: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one would be compiled in the middle of a merge."""
    called = set()
    call = Kernel.__call__

    def record(kernel: Kernel, *arguments: Any) -> None:
        called.add(f"{kernel._file}.{kernel._name}")
        call(kernel, *arguments)

    monkeypatch.setattr(Kernel, "__call__", record)
    base, *models = tensors("grid", (5, 33), count)
    both(method, base if based else None, models, options, 2)
    assert called <= set(METHODS[method].kernels)
    if based and METHODS[method].takes_base and count > 1:
        assert "linear.subtract" in METHODS[method].kernels  # the stream's
