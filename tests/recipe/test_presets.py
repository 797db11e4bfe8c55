from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import RecipeError
from edgemerge.methods.table import METHODS, list_presets
from edgemerge.recipe.presets import with_preset
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Rule


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a working directory with three models, as far as a recipe looks at them."""
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def test_the_papers_preset_fills_in_what_is_not_said(models: None) -> None:
    recipe = make_recipe("della", [("a", None), ("b", None)], base="base")
    given = with_preset(recipe, "paper")
    assert given.defaults == {
        "weight": (Rule(0.5),),
        "density": (Rule(0.6),),
        "epsilon": (Rule(0.05),),
    }
    assert given.slices == recipe.slices
    assert given.parameters == recipe.parameters


def test_the_ramp_is_for_every_method_with_a_lambda(models: None) -> None:
    has_lambda = [
        name for name, method in METHODS.items() if "lambda" in method.defaults(model=False)
    ]
    assert {"task_arithmetic", "ties", "hierarchical"} <= set(has_lambda)
    assert set(list_presets()["ramp"]) == {*has_lambda, "lines"}
    recipe = make_recipe("ties", [("a", None), ("b", None)], base="base")
    assert with_preset(recipe, "ramp").defaults == {
        "weight": (Rule(1.0),),
        "lambda": (Rule((0.6, 1.2)),),
    }
    recipe = make_recipe("lines", [("a", None), ("b", None)], base="base")
    ends = with_preset(recipe, "ramp").defaults
    assert (ends["alpha"], ends["beta"]) == ((Rule(0.6),), (Rule(0.6),))


@pytest.mark.parametrize(
    ("method", "preset", "message"),
    [
        ("linear", "papr", "unknown preset 'papr'; known are paper, ramp"),
        ("ties", "paper", "the preset paper says nothing of ties; it has linear, task_arithme"),
        ("linear", "ramp", "the preset ramp says nothing of linear; it has task_arithmetic, ties"),
        ("tise", "paper", "unknown merge method 'tise'; did you mean 'ties'?"),
    ],
)
def test_a_preset_that_is_not_there(models: None, method: str, preset: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_preset(make_recipe(method, [("a", None)]), preset)
    assert str(caught.value).startswith(message)
