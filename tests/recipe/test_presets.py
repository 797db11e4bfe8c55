from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import RecipeError
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


@pytest.mark.parametrize(
    ("method", "preset", "message"),
    [
        ("linear", "papr", "unknown preset 'papr'; known are paper"),
        ("ties", "paper", "the preset paper says nothing of ties; it has linear, task_arithme"),
        ("tise", "paper", "unknown merge method 'tise'; did you mean 'ties'?"),
    ],
)
def test_a_preset_that_is_not_there(models: None, method: str, preset: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_preset(make_recipe(method, [("a", None)]), preset)
    assert str(caught.value).startswith(message)
