"""`edgemerge update`: a device becomes what its SITE.yml says, if that is better."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import request
from edgemerge.cli.registry import print_left_out
from edgemerge.cli.terminal import plain, print_json, print_table, progress_bars, speaks_plainly
from edgemerge.types import Progress

if TYPE_CHECKING:
    from edgemerge.fleet.registry.client import Registry
    from edgemerge.fleet.report import Report
    from edgemerge.fleet.server import Server
    from edgemerge.fleet.site_file import Site

__all__ = ["SiteFile", "open_server", "print_report", "update_command"]

NICE = 10
BYTES = ("fetching", "hashing", "merging")  # what is counted in bytes

SiteFile = Annotated[
    Path,
    typer.Argument(
        metavar="SITE.yml",
        help="What the device shall be made of, and the rule of promotion; docs/fleet.md describes it.",
    ),
]


@speaks_plainly
def update_command(
    site: SiteFile,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Merge and ask again, even if nothing changed since last time."
        ),
    ] = False,
    systemd: Annotated[
        bool,
        typer.Option("--systemd", help="Print a service and a timer that do this, and end."),
    ] = False,
    json_: request.Json = False,
) -> None:
    """Fetch, merge and ask what a SITE.yml declares, and let the new model serve only if it is better.

    The command may be ended at any moment, by a power cut too: the same command goes on. It exits with 1
    where the update failed or was rolled back.
    """
    from edgemerge.fleet.site_file import read_site

    declared = read_site(site)
    if systemd:
        from edgemerge.fleet.timer import make_units

        print(make_units(declared), end="")
        return
    if dry_run:
        _foresee(declared, again=again, as_json=json_)
        return
    report = _update(declared, again=again, quiet=json_)
    print_report(report, as_json=json_)
    if not report.is_good:
        raise typer.Exit(1)


def _update(site: Site, *, again: bool, quiet: bool) -> Report:
    from edgemerge.fleet.examination import LlamaExaminer
    from edgemerge.fleet.ingredients import FileHashes
    from edgemerge.fleet.report import reporting
    from edgemerge.fleet.update import Update
    from edgemerge.runtime.library import load_library
    from edgemerge.site.folder import SiteFolder

    folder = SiteFolder(site.folder)
    with reporting(site):
        load_library()  # where it is missing: say so now, not after the merge
        registry, server = _open_registry(site, folder.registry), open_server(site)
        hashes = FileHashes(folder.hashes)
    os.nice(max(0, NICE - os.nice(0)))  # beside the model that serves
    examiner = LlamaExaminer(site, folder, hashes)
    bars: dict[str, Progress] = {}
    with progress_bars("", quiet=quiet) as (_, begin_part):

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = begin_part(what, None if what in BYTES else "questions")
            bars[what](done, total)

        update = Update(
            site,
            examiner,
            hashes,
            server=server,
            registry=registry,
            show=show,
            again=again,
        )
        report = update.run()
    if registry is not None:
        print_left_out(registry)
    return report


def open_server(site: Site) -> Server | None:
    """Open the server that a site names, if it does."""
    from edgemerge.fleet.server import Server

    return None if site.serve is None else Server(site.serve)


def _open_registry(site: Site, state: Path) -> Registry | None:
    from edgemerge.fleet.registry.client import Registry

    if site.registry is None:
        return None
    return Registry(site.registry.address, site.registry.trust, state)


def print_report(report: Report, *, as_json: bool) -> None:
    """Say on stdout what was done."""
    for failure in report.failures:
        print(f"note: {plain(failure)}", file=sys.stderr)
    if as_json:
        print_json(report.as_json())
        return
    print(f"{report.device}: {report.outcome.replace('_', ' ')}")
    # A verdict is a list of findings, a failure is one sentence.
    for sentence in [report.reason] if report.outcome == "failed" else report.reason.split("; "):
        print(f"  {plain(sentence)}")
    if report.current is not None:
        print(f"  serves {report.current.id}: {_describe(report.current.as_json())}")
    if report.seconds:
        spent = ", ".join(f"{step} {value:.1f} s" for step, value in report.seconds.items())
        print(f"  {spent}")


def _describe(record: Mapping[str, Any]) -> str:
    parts = [f"{one['name']} {one['version']}".strip() for one in record["made_of"]]
    return plain(f"{record['method']} of {', '.join(parts)}")


def _foresee(site: Site, *, again: bool, as_json: bool) -> None:
    from edgemerge.fleet.foresight import foresee
    from edgemerge.sizes import format_size

    with TemporaryDirectory() as state:  # what is seen of the registry is not kept
        registry = _open_registry(site, Path(state))
        told = foresee(site, registry, open_server(site), again=again)
    if registry is not None:
        print_left_out(registry)
    for note in told["notes"]:
        print(f"note: {plain(note)}", file=sys.stderr)
    if as_json:
        print_json(told)
        return
    words = {
        "unchanged": "nothing changed since the last update, so nothing would be done",
        "goes_on": "an update was cut off, and would go on",
        "merges": f"would merge by {told['method']} and ask both models",
    }
    print(f"{told['device']}: {words[told['does']]}")
    print_table(
        ("input", "version", "role", "size", "here"),
        [
            (
                plain(one["name"]),
                plain(one["version"]),
                one["role"],
                format_size(one["bytes"]),
                "yes" if one["is_here"] else "no",
            )
            for one in told["inputs"]
        ],
        right="size",
    )
    asked = [f"{n} of {plain(name)}" for name, n in told["questions"].items()]
    print(f"questions: {', '.join([*asked, *map(plain, told['texts'])])}")
    if told["merge"] is not None:
        print(
            f"merge: reads {format_size(told['merge']['read_bytes'])}, writes "
            f"{format_size(told['merge']['written_bytes'])} of {told['merge']['file_type']}, needs "
            f"{format_size(told['merge']['needed_bytes'])} of memory"
        )
    print(f"to fetch: {format_size(told['fetch_bytes'])}")
    print(f"folder: {plain(str(site.folder))}, where {told['serves'] or 'no model yet'} serves")
