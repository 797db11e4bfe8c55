"""Which settings of a recipe have no effect, and which its method refuses."""

from __future__ import annotations

from collections.abc import Collection

from edgemerge.errors import RecipeError
from edgemerge.finding.cache import folder_name
from edgemerge.methods.method import Method
from edgemerge.methods.parameters import INT8_MASK
from edgemerge.planning.jobs import hugging_face_names, list_experts
from edgemerge.types import ModelInput, Parameters, Recipe, Source

__all__ = ["idle_filters", "unused_settings"]


def unused_settings(recipe: Recipe, method: Method) -> list[str]:
    """Say which parts of the recipe have no effect, one sentence each.

    Raises
    ------
    RecipeError
        A switch is on that would make nonsense of the method.
    """
    for key, why in method.refuses.items():
        if _may_be_on(key, recipe):
            raise RecipeError(why, field=key)
    of_models = {*method.parameters_of(model=True), INT8_MASK.name}
    of_merge = of_models | method.parameters_of(model=False).keys()
    notes = [_unused(method, key, None) for key in recipe.parameters if key not in of_merge]
    for part in recipe.slices:
        notes += [_unused(method, key, None) for key in part.parameters if key not in of_merge]
        for model in list_experts(part, recipe.base_of(part), method):
            notes += [
                _unused(method, key, model) for key in model.parameters if key not in of_models
            ]
    notes += _idle_settings(recipe, method)
    listed = [model.path for part in recipe.slices for model in part.inputs]
    uses_base = method.uses_base(recipe.base) or method.merges_base
    bases = [part.base for part in recipe.slices]
    has_own_bases = all(part.base is not None for part in recipe.slices)
    if recipe.base is not None and has_own_bases and recipe.base not in (*listed, *bases):
        notes.append(
            f"every slice has a base of its own: {folder_name(recipe.base)} gives the metadata, but its "
            "weights are not part of the merge"
        )
    elif recipe.base is not None and not uses_base and recipe.base not in listed:
        notes.append(
            f"{method.name} has no base: {folder_name(recipe.base)} gives the metadata, but its weights "
            "are not part of the merge"
        )
    return notes


def idle_filters(recipe: Recipe, sources: Collection[Source]) -> list[str]:
    """Name each filter that no tensor of any model has in its name, as one that is misspelt."""
    levels = [*_levels(recipe), *(m.parameters for part in recipe.slices for m in part.inputs)]
    filters = {
        rule.filter: key for level in levels for key, rules in level.items() for rule in rules
    }
    filters.pop(None, None)
    if not filters:
        return []
    names = {name for source in sources for name in source.specs()} | hugging_face_names(sources)
    return [
        f"no tensor has {word!r} in its name, so that this filter of {key} has no effect"
        for word, key in filters.items()
        if not any(str(word) in name for name in names)
    ]


def _unused(method: Method, key: str, model: ModelInput | None) -> str:
    if model is None:
        return f"{method.name} does not use the parameter {key}"
    if key in method.parameters_of(model=False):
        return f"{key} belongs to the whole merge, so that of {folder_name(model.path)} is not used"
    return f"{method.name} does not use the parameter {key} of {folder_name(model.path)}"


def _idle_settings(recipe: Recipe, method: Method) -> list[str]:
    """Name what is set for a switch that is off."""
    given = {key for level in _levels(recipe) for key in level}
    return [
        f"{key} has no effect without {parameter.needs}: true"
        for key, parameter in method.parameters_of(model=False).items()
        if parameter.needs and key in given and not _may_be_on(parameter.needs, recipe)
    ]


def _may_be_on(switch: str, recipe: Recipe) -> bool:
    """Tell whether any rule turns on a switch that is off by default."""
    values = [rule.value for level in _levels(recipe) for rule in level.get(switch, ())]
    return any(any(value) if isinstance(value, tuple) else value for value in values)


def _levels(recipe: Recipe) -> list[Parameters]:
    return [recipe.parameters, *(part.parameters for part in recipe.slices), recipe.defaults]
