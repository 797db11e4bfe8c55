"""What can be seen to be impossible before anything is fetched or merged, which may take a night."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from edgemerge.errors import RecipeError
from edgemerge.fleet.ingredients import Ingredient
from edgemerge.fleet.site_file import Site
from edgemerge.formats.adapters.reference import is_adapter
from edgemerge.formats.quants.filetypes import FILE_TYPES, unknown_type
from edgemerge.methods.table import METHODS
from edgemerge.planning.header import KEEP
from edgemerge.recipe.values import check_alignment
from edgemerge.runtime.evaluation.tasks import read_task

__all__ = ["check_feasible"]


def check_feasible(site: Site, found: Sequence[Ingredient], *, serves: bool) -> dict[str, int]:
    """See that a site's merge and questions are possible, and count the questions of each task.

    Parameters
    ----------
    site : Site
        The file.
    found : sequence of Ingredient
        The inputs; they need not be here.
    serves : bool
        Whether a model serves, with which the new one is compared in place of the base.

    Raises
    ------
    EdgemergeError
        They are not.
    """
    if site.folder.exists() and not site.folder.is_dir():
        _fail(site.path, f"folder: {str(site.folder)!r} is a file; name a folder", "folder")
    _check_base(site, [one for one in found if one.role == "base"], serves=serves)
    if site.merge.recipe is None:
        try:
            _check_merge(site)
        except RecipeError as error:
            raise RecipeError(f"merge: {error}", path=site.path, field=error.field) from None
    for name, path in site.texts.items():
        if path.stat().st_size == 0:
            _fail(site.path, f"texts.{name}: {str(path)!r} is empty; give a longer text", "texts")
    return {name: len(read_task(name, path).questions) for name, path in site.questions.items()}


def _check_base(site: Site, bases: Sequence[Ingredient], *, serves: bool) -> None:
    for base in bases:
        kind = "model" if base.entry is None else base.entry.kind
        if base.path is not None and is_adapter(base.path):
            kind = "delta or an adapter"
        if kind != "model":
            _fail(site.path, f"base: {base.name} is a {kind}; give the model that it is of", "base")
        if base.path is not None and base.path.is_dir() and not serves:
            _fail(
                site.path,
                f"base: {str(base.path)!r} is a folder, and the first model is compared with the base; make "
                "a GGUF file of it with edgemerge convert, and name that",
                "base",
            )


def _check_merge(site: Site) -> None:
    merge, method = site.merge, METHODS[site.merge.method]
    asked = merge.out_type
    if asked is not None and asked.lower() != KEEP and asked.upper() not in FILE_TYPES:
        raise unknown_type(asked, [*FILE_TYPES, KEEP])
    if merge.align is not None:
        check_alignment(merge.align)
    for parameter in method.parameters:
        given = merge.parameters.get(parameter.name)
        if given is None and parameter.default is None and parameter.name != "weight":
            raise RecipeError(
                f"{method.name} needs parameters: {{{parameter.name}: …}}", field="parameters"
            )
        if isinstance(given, bool | int | float):  # of gradients and filters, the plan tells
            parameter.check(given)


def _fail(path: Path, message: str, field: str) -> NoReturn:
    raise RecipeError(message, path=path, field=field)
