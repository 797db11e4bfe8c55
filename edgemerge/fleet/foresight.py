"""What an update would do, without doing it: what it would fetch, merge and ask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgemerge.fleet.declared import Declared, declare
from edgemerge.fleet.feasible import check_feasible
from edgemerge.fleet.ingredients import FileHashes, Ingredient, Registry, find_all
from edgemerge.fleet.server import Server, ServerSilence
from edgemerge.fleet.site_file import Site
from edgemerge.merging.run import plan
from edgemerge.site.folder import SiteFolder
from edgemerge.site.ownership import check_free

__all__ = ["foresee"]


def foresee(
    site: Site,
    registry: Registry[Any] | None,
    server: Server | None = None,
    *,
    again: bool = False,
) -> dict[str, Any]:
    """Say what an update would do now; only the registry's signed lists are fetched.

    Parameters
    ----------
    site : Site
        What is declared.
    registry : Registry or None
        Of its experts.
    server : Server or None
        The device's.
    again : bool
        Whether it would be done even if nothing changed.

    Returns
    -------
    dict
        Plain types: `does` (unchanged, goes_on or merges), `serves`, `inputs`, `fetch_bytes`, `merge`
        (None while inputs are to be fetched), `questions`, and `notes` of what the update would complain of.

    Raises
    ------
    EdgemergeError
        What is declared is not possible.
    """
    check_free(site.folder)
    folder = SiteFolder(site.folder)
    hashes = FileHashes(folder.hashes)  # nothing is written
    found: list[Ingredient] = []
    if site.merge.recipe is None:
        if registry is not None:
            registry.refresh()
        found = find_all(site, hashes, registry)
    declared = declare(site, found, hashes)
    questions = check_feasible(declared, needs_base=declared.needs_base(folder))
    does = "merges"
    if folder.trying() is not None:
        does = "goes_on"
    elif not again and declared.settled_in(folder) is not None:
        does = "unchanged"
    here = [_is_here(one, folder) for one in declared.found]
    return {
        "device": site.device,
        "does": does,
        "digest": declared.digest,
        "serves": folder.current_id(),
        "inputs": [
            {**asdict(one.as_part()), "bytes": one.n_bytes, "is_here": is_here}
            for one, is_here in zip(declared.found, here, strict=True)
        ],
        "fetch_bytes": sum(
            one.n_bytes for one, is_here in zip(declared.found, here, strict=True) if not is_here
        ),
        "method": site.merge.method or "recipe",
        "settings": declared.settings(),
        "merge": _foresee_merge(declared, folder) if all(here) else None,
        "questions": questions,
        "texts": list(site.texts),
        "notes": list(_notes(site, server, folder.current_path)),
    }


def _notes(site: Site, server: Server | None, current: Path) -> Iterator[str]:
    if site.reports is not None and not site.reports.is_dir():
        yield f"{site.reports}: is no folder, so no report will be written; make it"
    if server is not None:
        try:
            server.check()
            if current.is_file() and (difference := server.find_difference(current)) is not None:
                yield difference
        except ServerSilence as silence:
            yield f"{silence}; the model will be watched in a process of its own"


def _is_here(one: Ingredient, folder: SiteFolder) -> bool:
    return one.entry is None or (folder.inputs / one.entry.file_name).is_file()


def _foresee_merge(declared: Declared, folder: SiteFolder) -> dict[str, Any]:
    """Plan the merge, whose fetched inputs lie in the folder."""
    site = declared.site
    found = [
        one if one.entry is None else replace(one, path=folder.inputs / one.entry.file_name)
        for one in declared.found
    ]
    the_plan = plan(
        declared.with_files(found).recipe(), memory=site.merge.memory, threads=site.threads
    )
    return {
        "file_type": the_plan.file_type,
        "read_bytes": the_plan.read_bytes,
        "written_bytes": the_plan.written_bytes,
        "needed_bytes": the_plan.needed_bytes,
        "budget_bytes": the_plan.budget,
    }
