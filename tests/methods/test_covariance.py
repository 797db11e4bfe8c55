"""The method covariance: what must hold whatever the numbers are, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgemerge
from edgemerge.errors import BudgetError, RecipeError
from edgemerge.types import Recipe
from tests.support.memory_stream import merge_in_memory
from tests.support.small_models import write_gguf
from tests.twins.covariance import covariance

Float32 = NDArray[np.float32]

BASE = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32)


def change(seed: int, rows: slice = slice(None), columns: slice = slice(None)) -> Float32:
    """A change of some rows and columns alone."""
    found = np.zeros_like(BASE)
    noise = np.random.default_rng(seed).standard_normal(BASE.shape).astype(np.float32)
    found[rows, columns] = 0.1 * noise[rows, columns]
    return found


def merged(
    *models: Float32, weights: tuple[float, ...] = (1.0, 1.0, 1.0), **options: Any
) -> Float32:
    pairs = [(x, {"weight": w}) for x, w in zip(models, weights, strict=False)]
    return merge_in_memory("covariance", BASE, pairs, options)


@pytest.mark.parametrize("columns", [0.0, 7.0])
def test_equal_models_are_that_model(columns: float) -> None:
    model = BASE + change(1)
    assert merged(model, model, model, columns=columns) == pytest.approx(model, abs=1e-6)


def test_without_a_limit_all_columns_are_taken_together() -> None:
    models = [BASE + change(1), BASE + change(2, rows=slice(0, 30))]
    want = covariance(BASE, models, [1.0, 1.0], columns=0)
    assert merged(*models, columns=0.0) == pytest.approx(want, abs=1e-6)
    assert np.array_equal(merged(*models, columns=0.0), merged(*models, columns=24.0))
    assert not np.allclose(merged(*models, columns=12.0), want, atol=1e-3)


def test_models_that_change_other_columns_keep_all_of_their_changes() -> None:
    """Where the covariances have nothing in common, neither model gives way, but by the ridge."""
    a, b = change(1, columns=slice(0, 12)), change(2, columns=slice(12, 24))
    assert merged(BASE + a, BASE + b, ridge=1e-4) == pytest.approx(BASE + a + b, abs=1e-3)
    halfway = merged(BASE + a, BASE + b, ridge=1e4)
    assert halfway == pytest.approx(BASE + (a + b) / 2, abs=1e-3)


def test_a_model_that_changed_nothing_has_no_part() -> None:
    model = BASE + change(1)
    assert merged(model, BASE) == pytest.approx(model, abs=1e-6)
    assert merged(BASE, model) == pytest.approx(model, abs=1e-6)
    assert np.array_equal(merged(BASE, BASE), BASE)
    assert merged(model, BASE, weights=(0.0, 1.0)) == pytest.approx(BASE, abs=1e-6)


def test_embeddings_are_averaged() -> None:
    models = [BASE + change(1), BASE + change(2)]
    pairs = [(x, {"weight": w}) for x, w in zip(models, (1.0, 3.0), strict=True)]
    found = merge_in_memory("covariance", BASE, pairs, {}, tensor="token_embd.weight")
    assert found == pytest.approx(0.25 * models[0] + 0.75 * models[1], abs=1e-6)


def test_only_the_ratio_of_weights_counts() -> None:
    models = [BASE + change(1), BASE + change(2)]
    assert merged(*models, weights=(0.2, 0.6)) == pytest.approx(
        merged(*models, weights=(1.0, 3.0)), abs=1e-6
    )
    assert merged(*models, weights=(1.0, 0.0)) == pytest.approx(models[0], abs=1e-6)


def test_the_order_of_models_does_not_matter_but_for_rounding() -> None:
    models = [BASE + change(seed) for seed in range(3)]
    assert merged(*models) == pytest.approx(merged(*models[::-1]), abs=1e-6)


@pytest.fixture
def wide(tmp_path: Path) -> list[str]:
    """A base and two models with 2048 columns."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((64, 2048)).astype(np.float32)
    noise = [0.1 * rng.standard_normal(base.shape).astype(np.float32) for _ in range(2)]
    return [
        str(write_gguf(tmp_path / f"{i}.gguf", {"blk.0.ffn_down.weight": x}))
        for i, x in enumerate([base, *(base + change for change in noise)])
    ]


def recipe_of(models: list[str], weights: tuple[float, float] = (1.0, 1.0), **own: Any) -> Recipe:
    pairs = list(zip(models[1:], weights, strict=True))
    return edgemerge.make_recipe(
        "covariance", pairs, base=models[0], parameters=own, out_type="F32"
    )


def test_a_budget_for_all_columns_is_found_and_kept(wide: list[str], tmp_path: Path) -> None:
    """The columns that are taken together follow from the recipe, never from the budget."""
    recipe = recipe_of(wide, columns=0)
    with pytest.raises(BudgetError) as caught:
        edgemerge.plan(recipe, memory=100 << 20)
    least = caught.value.needed
    assert least > (64 << 20) + 2 * 4 * 2048**2 + 8 * 2048**2
    made = [
        edgemerge.merge(recipe, tmp_path / "out.gguf", memory=memory, threads=threads, force=True)
        for memory, threads in ((least, 1), (1 << 30, 2))
    ]
    assert made[0].sha256 == made[1].sha256
    assert edgemerge.plan(recipe_of(wide), memory=100 << 20).needed_bytes < 100 << 20


@pytest.mark.parametrize(
    ("weights", "parameters", "message"),
    [
        (
            (1.0, -0.5),
            {},
            "takes weights from 0, not all of them 0, and blk.0.ffn_down.weight has 1, -0.5",
        ),
        ((0.0, 0.0), {}, "has 0, 0; change them"),
        ((1.0, 1.0), {"ridge": 0}, "ridge must be above 0"),
        ((1.0, 1.0), {"columns": 1.5}, "it must be a whole number from 0"),
    ],
)
def test_settings_without_a_solution_are_refused(
    wide: list[str], weights: tuple[float, float], parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        edgemerge.plan(recipe_of(wide, weights, **parameters))
