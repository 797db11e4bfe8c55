"""Settings by name: the published ones of a paper, and a lambda that grows with depth."""

from __future__ import annotations

from dataclasses import replace

from edgemerge.errors import RecipeError
from edgemerge.methods.table import find_method, list_presets
from edgemerge.types import Recipe, Rule

__all__ = ["with_preset"]


def with_preset(recipe: Recipe, name: str) -> Recipe:
    """Give a recipe the settings of a preset where it does not say otherwise.

    Weights, too, are those of `paper` where none are given: equal, with a sum of one.

    Raises
    ------
    RecipeError
        There is no such preset, or it says nothing of the recipe's method.
    """
    presets = list_presets()
    if name not in presets:
        raise RecipeError(
            f"unknown preset {name!r}; known are {', '.join(presets)}", field="preset"
        )
    methods = presets[name]
    if recipe.method not in methods:
        find_method(recipe.method)
        raise RecipeError(
            f"the preset {name} says nothing of {recipe.method}; it has {', '.join(methods)}",
            field="preset",
        )
    if recipe.stages:
        raise RecipeError("a preset is for one merge, not for several stages", field="preset")
    settings = dict(methods[recipe.method])
    if name == "paper":
        settings["weight"] = 1.0 / max(1, _count_models(recipe))
    rules = {key: (Rule(value),) for key, value in settings.items()}
    return replace(recipe, defaults={**recipe.defaults, **rules})


def _count_models(recipe: Recipe) -> int:
    return max(
        len([m for m in part.inputs if m.path != recipe.base_of(part)]) for part in recipe.slices
    )
