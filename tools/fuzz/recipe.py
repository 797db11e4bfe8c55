"""A merge recipe."""

from __future__ import annotations

from pathlib import Path

from edgemerge.recipe.recipe import load_recipe

__all__ = ["read_recipe"]


def read_recipe(data: bytes, folder: Path) -> None:
    """Read an input as a recipe, beside models with the names that the corpus uses."""
    for name in ("a", "b", "base"):
        (folder / name).mkdir(exist_ok=True)
    path = folder / "recipe.yml"
    path.write_bytes(data)
    load_recipe(path)
