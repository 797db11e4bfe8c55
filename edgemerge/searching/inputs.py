"""The files that trials of a search read, and what shows that they are the same ones later."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgemerge.errors import RecipeError
from edgemerge.formats.adapters.reference import expand_inputs, model_name
from edgemerge.formats.gguf.model import parts_of
from edgemerge.formats.hub.files import ADAPTER, CARD, FOLDER_FILES
from edgemerge.recipe.searches import SearchRecipe
from edgemerge.searching.trials import first_values

__all__ = ["list_inputs", "mark_inputs"]


def list_inputs(found: SearchRecipe, path: Path | None = None) -> tuple[Path, ...]:
    """List every file or folder that a trial may read: models, adapters, importance matrices, tokenizers.

    A word names the same file whatever the other words are. So the start with each other word has all.
    Where such a recipe is refused, all trials with that word are, and read nothing.

    Parameters
    ----------
    found : SearchRecipe
        The recipe.
    path : Path, optional
        As of `SearchRecipe.recipe`.
    """
    inputs: list[Path] = []
    for values in first_values(found.spaces):
        try:
            inputs += found.recipe(values, path).inputs()
        except RecipeError:
            continue
    return expand_inputs(inputs)


def mark_inputs(paths: Iterable[Path]) -> list[list[object]]:
    """Return the names of inputs, and sizes and times of their files; as JSON."""
    return [[model_name(path), *_states(path)] for path in paths]


def _states(path: Path) -> list[list[int]]:
    files = filter(_is_read, sorted(path.iterdir())) if path.is_dir() else parts_of(path)
    states = [file.stat() for file in files if file.is_file()]
    return [[state.st_size, state.st_mtime_ns] for state in states]


def _is_read(file: Path) -> bool:
    """Tell whether a file of a directory is its model's; other files may come and go."""
    is_named = file.name in (*FOLDER_FILES, ADAPTER) and file.name != CARD
    return is_named or file.suffix == ".safetensors"
