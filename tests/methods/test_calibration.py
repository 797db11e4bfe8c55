"""Singular value calibration: the paper's formula, examples that need no computing, cuts and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.errors import RecipeError
from edgemerge.methods.table import METHODS
from tests.support.memory_stream import MemoryStream, merge_in_memory
from tests.twins import elements, singular
from tests.twins import methods as reference

Float32 = NDArray[np.float32]
METHODS_WITH_SVC = [
    name for name, method in METHODS.items() if "svc" in method.parameters_of(model=False)
]
NAME = "blk.1.ffn_up.weight"
OWN = ({"weight": 0.9}, {"weight": 0.6}, {"weight": 1.0})
PRUNED = {"density": 0.6, "epsilon": 0.2, "gamma": 0.1}


def changes(shape: tuple[int, ...], count: int) -> list[Float32]:
    """A base of zeros and experts with two directions in common and two of their own, of clear sizes."""
    rng = np.random.default_rng([*shape, count])
    rows, cols = int(np.prod(shape[:-1])), shape[-1]

    def of_rank_two() -> NDArray[np.float64]:
        return (rng.standard_normal((rows, 2)) * (1, 0.6)) @ rng.standard_normal((2, cols))

    common = of_rank_two()
    models = [common + of_rank_two() for _ in range(count)]
    return [np.asarray(x, np.float32).reshape(shape) for x in (np.zeros(shape), *models)]


def merge(method: str, arrays: Sequence[Float32], rows: int = 1 << 20, **options: Any) -> Float32:
    known = METHODS[method].parameters_of(model=True)
    own = [{**w, **{k: v for k, v in PRUNED.items() if k in known}} for w in OWN]
    models = [(x, o) for x, o in zip(arrays[1:], own, strict=False)]
    return merge_in_memory(
        method, arrays[0], models, {"svc": True, **options}, rows_per_block=rows, tensor=NAME
    )


def pruned(
    method: str, arrays: Sequence[Float32], options: Mapping[str, Any]
) -> list[NDArray[np.float64]]:
    """What the method keeps of each expert: it alone, with a weight of 1 and without an election."""
    rescale = options.get("rescale", method in reference.RESCALES)
    kind, keys = reference.PRUNES[method], reference.random_keys(0, NAME, arrays[1:])
    return [
        reference.prune(kind, x, PRUNED, rescale, key)
        for x, key in zip(arrays[1:], keys, strict=True)
    ]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 10, 16), (5, 1), (1, 9)])
@pytest.mark.parametrize("rank", [4.0, 100.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_task_arithmetic_equals_its_definition(
    shape: tuple[int, ...], rank: float, count: int
) -> None:
    arrays = changes(shape, count)
    got = merge("task_arithmetic", arrays, 7, svc_rank=rank, **{"lambda": 0.8})
    wide = [x.reshape(-1, shape[-1]).astype(np.float64) for x in arrays[1:]]
    merged = sum(o["weight"] * x for o, x in zip(OWN, wide, strict=False))
    want = 0.8 * singular.calibrate(np.asarray(merged), wide, int(rank)).reshape(shape)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("options", [{}, {"rescale": True, "normalize": True}])
@pytest.mark.parametrize(
    "method", [name for name in METHODS_WITH_SVC if reference.PRUNES.get(name)]
)
def test_what_is_pruned_is_calibrated(method: str, options: dict[str, Any]) -> None:
    arrays = changes((40, 24), 2)
    got = merge(method, arrays, 7, **options)
    models = [(x, {**own, **PRUNED}) for x, own in zip(arrays[1:], OWN, strict=False)]
    merged = reference.merge_tensor(method, arrays[0], models, options, tensor=NAME)
    kept = pruned(method, arrays, options)
    want = singular.calibrate(merged.values, kept, 16)
    assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 10, 16)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *(("hierarchical", {"weighting": name}) for name in ("agreement", "stock", "linear")),
        ("hierarchical", {"scope": "row"}),
        ("hierarchical", {"weighting": "importance"}),
        ("sce", {}),
        ("tsv", {"rank": 3.0}),
        ("tsv", {"rank": 100.0}),
    ],
)
def test_any_other_merge_is_calibrated(
    method: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    arrays = changes(shape, 2)
    scale = {"lambda": 0.8} if "lambda" in METHODS[method].parameters_of(model=False) else {}
    plain = merge(method, arrays, svc=False, **options)
    got = merge(method, arrays, 7, svc_rank=6.0, **options, **scale)
    wide = [x.reshape(-1, shape[-1]).astype(np.float64) for x in (plain, *arrays[1:])]
    least = 1.0 if method == "tsv" else None
    want = singular.calibrate(wide[0], wide[1:], 6, least).reshape(shape) * (0.8 if scale else 1)
    assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()


def test_columns_weighted_by_importance_are_calibrated() -> None:
    arrays = changes((3, 10, 16), 2)
    measured = [
        np.random.default_rng(i).random((3, 16)).astype(np.float32) + np.float32(0.1)
        for i in range(2)
    ]
    models = [(x, {"weight": 1.0}) for x in arrays[1:]]
    plain, got = (
        merge_in_memory(
            "hierarchical",
            arrays[0],
            models,
            {"weighting": "importance", "svc": svc},
            tensor=NAME,
            importances=measured,
        )
        for svc in (False, True)
    )
    wide = [x.reshape(-1, 16).astype(np.float64) for x in (plain, *arrays[1:])]
    want = singular.calibrate(wide[0], wide[1:], 16).reshape(plain.shape)
    assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()
    assert not np.allclose(got, plain, atol=1e-2)


def test_what_sce_selects_is_calibrated() -> None:
    base, *models = changes((40, 24), 2)
    given: list[tuple[Float32, dict[str, Any]]] = [(x, {}) for x in models]
    plain, got = (
        merge_in_memory(
            "sce", base, given, {"select_topk": 0.5, "svc": svc}, rows_per_block=9, tensor=NAME
        )
        for svc in (False, True)
    )
    wide = np.array(models, np.float64)
    kept = np.where(elements.sce_selected(wide, 0.5), wide, 0.0)
    want = singular.calibrate(plain.astype(np.float64), [*kept], 16)
    assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()


def test_tsv_counts_nothing_up() -> None:
    """Of two experts that respond half, task arithmetic makes the change whole again, and tsv does not."""
    _, x = changes((30, 20), 1)
    models = [(x, {"weight": 0.5}), (np.zeros_like(x), {"weight": 0.5})]
    given = (np.zeros_like(x), models, {"svc": True})
    most = float(np.abs(x).max())
    assert merge_in_memory("task_arithmetic", *given, tensor=NAME) == pytest.approx(
        x, abs=most / 1e5
    )
    assert merge_in_memory("tsv", *given, tensor=NAME) == pytest.approx(x / 2, abs=most / 1e3)


def test_svc_has_nothing_to_do_where_tsv_has_not() -> None:
    x = np.ones((4, 4), np.float32)
    stream = MemoryStream("tsv", x, [(x, {})], {"svc": True, "rank": 0.0}, 9, 0, NAME)
    with pytest.raises(RecipeError, match="nothing for svc to calibrate; use task_arithmetic"):
        METHODS["tsv"].check(stream.job)


@pytest.mark.parametrize("method", METHODS_WITH_SVC)
def test_block_height_does_not_show(method: str) -> None:
    arrays = changes((37, 20), 2)
    results = {merge(method, arrays, rows, svc_rank=5.0).tobytes() for rows in (37, 1, 8)}
    assert len(results) == 1


def test_what_experts_share_is_counted_once() -> None:
    """Two equal experts: the sum of both is twice the change, which becomes the change again."""
    _, x = changes((30, 20), 1)
    merged = merge_in_memory(
        "task_arithmetic", np.zeros_like(x), [(x, {"weight": 1.0})] * 2, {"svc": True}, tensor=NAME
    )
    assert merged == pytest.approx(x, abs=1e-5 * float(np.abs(x).max()))


def test_what_one_expert_has_stays() -> None:
    """Changes in rows and columns of their own have no direction in common."""
    x, y = np.zeros((2, 16, 16), np.float32)
    x[:8, :8] = np.random.default_rng(0).standard_normal((8, 8)) + 8 * np.eye(8)
    y[8:, 8:] = np.random.default_rng(1).standard_normal((8, 8)) + 8 * np.eye(8)
    models = [(x, {"weight": 1.0}), (y, {"weight": 1.0})]
    merged = merge_in_memory(
        "task_arithmetic", np.zeros_like(x), models, {"svc": True}, tensor=NAME
    )
    assert merged == pytest.approx(x + y, abs=1e-4)


@pytest.mark.parametrize("name", ["token_embd.weight", "output.weight"])
def test_embeddings_stay_as_merged(name: str) -> None:
    base, *models = changes((12, 8), 2)
    given = [(x, {"weight": 1.0}) for x in models]
    plain = merge_in_memory("task_arithmetic", base, given, tensor=name)
    assert np.array_equal(
        merge_in_memory("task_arithmetic", base, given, {"svc": True}, tensor=name), plain
    )


def test_vectors_stay_as_merged() -> None:
    base, *models = changes((1, 30), 2)
    given = [(x[0], {"weight": 1.0}) for x in models]
    plain = merge_in_memory("ties", base[0], given, tensor=NAME)
    assert np.array_equal(
        merge_in_memory("ties", base[0], given, {"svc": True}, tensor=NAME), plain
    )


@pytest.mark.parametrize("method", METHODS_WITH_SVC)
def test_no_rank_is_no_calibration(method: str) -> None:
    arrays = changes((13, 9), 2)
    plain = merge(method, arrays, svc=False)
    assert np.array_equal(merge(method, arrays, svc_rank=0.0), plain)


def test_experts_equal_to_the_base_leave_it() -> None:
    base = changes((9, 7), 1)[1]
    assert np.array_equal(merge("task_arithmetic", [base, base, base]), base)
