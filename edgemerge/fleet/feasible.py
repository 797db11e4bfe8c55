"""What can be seen to be impossible before anything is fetched or merged, which may take a night."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NoReturn

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.fleet.declared import Declared
from edgemerge.fleet.ingredients import Ingredient
from edgemerge.fleet.registry.offers import base_checksum, read_offer
from edgemerge.fleet.site_file import Site
from edgemerge.formats.adapters.reference import is_adapter
from edgemerge.formats.quants.filetypes import FILE_TYPES, unknown_type
from edgemerge.methods.table import METHODS
from edgemerge.planning.header import KEEP
from edgemerge.recipe.values import check_alignment
from edgemerge.runtime.evaluation.suite import CHUNK
from edgemerge.runtime.evaluation.tasks import read_task
from edgemerge.site.ownership import CLEARED, REGISTRY, is_changed

__all__ = ["check_feasible", "compared_base"]


def check_feasible(declared: Declared, *, needs_base: bool) -> dict[str, int]:
    """See that a site's merge and questions are possible, and count the questions of each task.

    Parameters
    ----------
    declared : Declared
        The site and its inputs, which need not be here.
    needs_base : bool
        Whether the new model is compared with the base, as none serves (`Declared.needs_base`).

    Raises
    ------
    EdgemergeError
        They are not.
    """
    site, found = declared.site, declared.found
    if site.folder.exists() and not site.folder.is_dir():
        _fail(site.path, f"folder: {str(site.folder)!r} is a file; name a folder", "folder")
    _check_places(site, [*found, *filter(None, [declared.beside])])
    _check_base(site, declared.base, is_compared=needs_base)
    if site.merge.recipe is None:
        _check_deltas(site, found)
        try:
            _check_merge(site)
        except RecipeError as error:
            raise RecipeError(f"merge: {error}", path=site.path, field=error.field) from None
    for name, path in site.texts.items():
        if (size := path.stat().st_size) < 2 * CHUNK:  # a token has a byte at least
            _fail(
                site.path,
                f"texts.{name}: {str(path)!r} has {size} bytes, and perplexity needs {2 * CHUNK} tokens; "
                "give a longer text",
                "texts",
            )
    return {name: len(read_task(name, path).questions) for name, path in site.questions.items()}


def _check_places(site: Site, found: Sequence[Ingredient]) -> None:
    """See that nothing that the site names lies where updates change or remove files."""
    merge, serve, registry = site.merge, site.serve, site.registry
    named = [one.path for one in found if one.entry is None]
    named += [*site.questions.values(), *site.texts.values(), merge.imatrix, merge.recipe]
    named += [] if serve is None else [serve.key]
    named += [] if registry is None else [registry.trust]
    for path, name in product(filter(None, named), (*CLEARED, REGISTRY)):
        real, home = path.resolve(), (site.folder / name).resolve()
        if real.is_relative_to(home) and is_changed(name, real.relative_to(home)):
            raise RecipeError(
                f"names {str(path)!r}, which lies in {name}/ of the device's folder, where updates change "
                "and remove files; keep it elsewhere",
                path=site.path,
            )


def _check_base(site: Site, base: Ingredient | None, *, is_compared: bool) -> None:
    if base is not None:
        kind = "model" if base.entry is None else base.entry.kind
        if base.path is not None and is_adapter(base.path):
            kind = "delta or an adapter"
        if kind != "model":
            _fail(site.path, f"base: {base.name} is a {kind}; give the model that it is of", "base")
    if is_compared:
        compared_base(site, base)


def compared_base(site: Site, base: Ingredient | None) -> Ingredient:
    """Return the base, with which a new model is compared where none serves.

    Parameters
    ----------
    site : Site
        The file, for the message.
    base : Ingredient or None
        Its base.

    Raises
    ------
    RecipeError
        There is none, or it is a folder, which llama.cpp does not read.
    """
    if base is None:
        _fail(
            site.path,
            f"merge.recipe: {str(site.merge.recipe)!r} has no base, and the first model is compared with "
            "one; name it beside the recipe, as base: {path: FILE.gguf}",
            "base",
        )
    if base.path is not None and base.path.is_dir():
        _fail(
            site.path,
            f"base: {str(base.path)!r} is a folder, and the first model is compared with the base; make "
            "a GGUF file of it with edgemerge convert, and name that",
            "base",
        )
    return base


def _check_deltas(site: Site, found: Sequence[Ingredient]) -> None:
    """See that all deltas are of the base; where its checksum is not known, that they are of one."""
    if not any(one.role == "delta" for one in found):
        return
    known: tuple[str, str] | None = None  # whose base it is in words, and the checksum
    for one in found:
        if (checksum := _base_of(one)) is None:
            continue
        title = f"{one.name} {one.version}".rstrip()
        if known is None:
            known = (title if one.role == "base" else f"that of {title}", checksum)
        elif checksum != known[1]:
            raise MismatchError(
                f"{site.path}: experts: {title} is a delta of another base than {known[0]}: the checksums "
                f"are {checksum} and {known[1]}; name deltas of one base, and that base"
            )


def _base_of(one: Ingredient) -> str | None:
    """Return the checksum of a delta's base, or a base's own; None of what has none or is not here."""
    if one.role not in ("base", "delta"):
        return None
    if one.path is None:
        return None if one.entry is None else one.entry.base
    return base_checksum(one.path) if one.role == "base" else read_offer(one.path).base


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
