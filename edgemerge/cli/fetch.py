"""`edgemerge fetch`: what a registry offers, and its files, verified before anything is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.registry import State, Trust, print_left_out
from edgemerge.cli.terminal import plain, print_json, print_table, progress_bar, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.fleet.registry.client import Entry, Registry

__all__ = ["fetch_command"]


@speaks_plainly
def fetch_command(
    registry: Annotated[
        str,
        typer.Argument(
            metavar="REGISTRY", help="Folder or address of it (https://, s3://, sftp://)."
        ),
    ],
    trust: Trust,
    wanted: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME[@VERSION]",
            help="What to fetch, the newest version where none is given; without it, all are listed.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Folder for the file."),
    ] = Path(),
    state: State = None,
    json_: request.Json = False,
) -> None:
    """Fetch a published file, verified by signature and checksum, going on where an earlier fetch stopped."""
    from edgemerge.fleet.registry.client import Registry, state_folder

    there = Registry(registry, trust, state or state_folder(registry))
    offered = there.entries()
    print_left_out(there)
    if wanted is None:
        _list(offered, as_json=json_)
        return
    name, at, version = wanted.partition("@")
    if at and not version:
        raise typer.BadParameter(f"{wanted}: give a version after the @, or no @")
    _fetch(there, there.find(name, version or None), output, as_json=json_)


def _fetch(there: Registry, entry: Entry, output: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from edgemerge.sizes import format_size

    with progress_bar(f"fetch {entry.file_name}", quiet=as_json) as progress:
        path = there.fetch(entry, output, progress)
    if as_json:
        print_json({"path": str(path), **asdict(entry)})
        return
    print(f"{plain(str(path))}  {entry.kind}, {format_size(entry.n_bytes)}, verified")
    print(f"  sha256 {entry.sha256}")
    print(f"  published {entry.published[:10]} by the key {entry.publisher}")
    if entry.base:
        print(f"  base {entry.base}")
    print(f"  licence {plain(entry.licence) or 'not stated'}")


def _list(entries: list[Entry], *, as_json: bool) -> None:
    from dataclasses import asdict

    from edgemerge.sizes import format_size

    if as_json:
        print_json({"entries": [asdict(entry) for entry in entries]})
        return
    rows = [
        (
            e.name,
            e.version,
            e.kind,
            format_size(e.n_bytes),
            e.base or "",
            e.published[:10],
            plain(e.licence),
        )
        for e in entries
    ]
    print_table(
        ("name", "version", "kind", "size", "base", "published", "licence"), rows, right="size"
    )
