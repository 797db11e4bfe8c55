"""Several documents in one recipe: merges that take the results of others, as of mergekit-multi.

::

    name: pt1                      a stage; its result is a model that later documents may name
    merge_method: linear
    models: [...]
    ---
    merge_method: slerp            without a name, or named by no other: the output
    base_model: pt1
    models: [...]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemerge.errors import RecipeError
from edgemerge.finding.finder import Finder
from edgemerge.recipe.mergekit import RecipeReader
from edgemerge.token_rows import TokenRule
from edgemerge.types import Recipe, Slice

__all__ = ["place_stages", "read_stages", "stage_paths", "with_settings"]


MAX_STAGES = 100


def read_stages(
    documents: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    strict: bool,
    finder: Finder | None = None,
) -> Recipe:
    """Read all documents of a recipe, and put the stages in order.

    Parameters
    ----------
    documents : sequence of mapping
        Two or more.
    path : Path
        The recipe's file.
    strict, finder
        As `RecipeReader` takes them.

    Returns
    -------
    Recipe
        The one that makes the output, with the others as its stages. The relative path `Path(NAME)` stands
        for the result of a stage.

    Raises
    ------
    RecipeError
        A document is wrong, two have one name, or stages need each other.
    """
    names = _names(documents, path)
    recipes: dict[str | None, Recipe] = {}
    for name, document in zip(names, documents, strict=True):
        reader = RecipeReader(
            path, strict=strict, stages=frozenset(filter(None, names)), finder=finder
        )
        recipes[name] = replace(reader.recipe(document), name=name)
    last = None if None in recipes else _last(recipes)
    order = _in_order(recipes, last, path)
    notes = [
        f"the stage {name} is not made: the output does not need it"
        for name in recipes
        if name not in order
    ]
    output = recipes[last]
    stages = [_as_stage(recipes[name], output) for name in order[:-1]]
    return replace(output, stages=tuple(stages), notes=(*output.notes, *notes))


def _as_stage(recipe: Recipe, output: Recipe) -> Recipe:
    """Give a stage the output's budget, and F32 unless it names a type: nothing is rounded in silence."""
    notes = recipe.notes
    if recipe.out_type not in (None, "F32"):
        notes += (f"its result is stored as {recipe.out_type}, as its document says",)
    if recipe.out_format != "gguf":
        notes += ("format is that of the output alone; a stage is kept as a GGUF",)
    return replace(
        recipe,
        out_format="gguf",
        memory=recipe.memory or output.memory,
        out_type=recipe.out_type or "F32",
        notes=notes,
    )


def _names(documents: Sequence[Mapping[str, Any]], path: Path) -> list[str | None]:
    if len(documents) > MAX_STAGES:
        raise RecipeError(
            f"has {len(documents)} documents, more than {MAX_STAGES}; make a recipe of each part",
            path=path,
        )
    names = [document.get("name") for document in documents]
    for i, name in enumerate(names):
        if name is not None and (not isinstance(name, str) or not name or Path(name).is_absolute()):
            raise RecipeError(f"the name of document {i + 1} is no plain text", path=path)
        if name in names[:i]:
            what = "have no name" if name is None else f"have the name {name!r}"
            raise RecipeError(
                f"two documents {what}; give each stage a name of its own, and none to the last",
                path=path,
                field="name",
            )
    return names


def _last(recipes: Mapping[str | None, Recipe]) -> str | None:
    """Choose the output where all documents have names: the last one that no other takes."""
    taken = {name for recipe in recipes.values() for name in _needs(recipe)}
    free = [name for name in recipes if name not in taken]
    return free[-1] if free else [*recipes][-1]


def _in_order(
    recipes: Mapping[str | None, Recipe], last: str | None, path: Path
) -> list[str | None]:
    """List what a recipe needs, before it, and itself."""
    order: list[str | None] = []
    begun: set[str | None] = set()

    def visit(name: str | None) -> None:
        if name in order:
            return
        if name in begun:
            raise RecipeError(
                f"the stage {name!r} needs its own result; change the name of the stage or of the model",
                path=path,
                field="name",
            )
        begun.add(name)
        for needed in _needs(recipes[name]):
            visit(needed)
        order.append(name)

    visit(last)
    return order


def _needs(recipe: Recipe) -> list[str]:
    """List the stages that a recipe takes models, or its tokenizer, from."""
    paths = [*recipe.models()]
    if recipe.tokenizer_source not in (None, "base", "union"):
        paths.append(Path(str(recipe.tokenizer_source)))
    return [str(path) for path in paths if not path.is_absolute()]


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    """Return a recipe with other settings, in all of its stages too."""
    stages = tuple(replace(stage, **settings) for stage in recipe.stages)
    return replace(recipe, stages=stages, **settings)


def stage_paths(recipe: Recipe, folder: Path) -> dict[Path, Path]:
    """Map what stands for each stage to the file of its result.

    Parameters
    ----------
    recipe : Recipe
        With stages.
    folder : Path
        Where the files are to be.
    """
    paths: dict[Path, Path] = {}
    for stage in recipe.stages:
        plain = re.sub(r"[^\w.+-]+", "-", str(stage.name)).strip("-.") or "stage"
        names = {path.name for path in paths.values()}
        while f"{plain}.gguf" in names:
            plain += "-"
        paths[Path(str(stage.name))] = folder / f"{plain}.gguf"
    return paths


def place_stages(recipe: Recipe, paths: Mapping[Path, Path]) -> Recipe:
    """Return a recipe that takes the results of stages from these files, and has no stages itself."""

    def placed(part: Slice) -> Slice:
        inputs = tuple(replace(i, path=paths.get(i.path, i.path)) for i in part.inputs)
        base = None if part.base is None else paths.get(part.base, part.base)
        return replace(part, inputs=inputs, base=base)

    def placed_rule(rule: TokenRule) -> TokenRule:
        return replace(rule, model=rule.model and paths.get(rule.model, rule.model))

    source = recipe.tokenizer_source
    return replace(
        recipe,
        base=None if recipe.base is None else paths.get(recipe.base, recipe.base),
        slices=tuple(map(placed, recipe.slices)),
        tokenizer_source=None if source is None else str(paths.get(Path(source), source)),
        tokens={text: placed_rule(rule) for text, rule in recipe.tokens.items()},
        stages=(),
    )
