"""`edgemerge fleet`: Look after many devices that update themselves."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.terminal import plain, print_json, speaks_plainly

__all__ = ["GROUP"]

NEEDS_SOMEBODY = 3  # the exit status where a device has to be looked at


@speaks_plainly
def status_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Where devices leave their reports, DEVICE.json."),
    ],
    page: Annotated[
        Path | None,
        typer.Option("--page", metavar="FLEET.html", help="Write a page, too; replaces one."),
    ] = None,
    stale: Annotated[
        str,
        typer.Option("--stale", metavar="TIME", help="A device that is silent so long is told of."),
    ] = "2d",
    json_: request.Json = False,
) -> None:
    """Say what devices run, what it scores, what failed; the exit status is 3 where one needs somebody."""
    from edgemerge.cli.fleet_tables import as_json, page_sections, print_status
    from edgemerge.fleet.status import read_status
    from edgemerge.output.file import check_output, write_file
    from edgemerge.reports.fleet import fleet_page
    from edgemerge.sizes import parse_duration

    stale_after = parse_duration(stale)
    if page is not None:
        if page.suffix.lower() not in (".html", ".htm"):  # a device's report has to stay one
            raise typer.BadParameter(f"--page {page} must end in .html")
        check_output(page, (), force=True)
    status = read_status(folder, stale_after=stale_after, now=datetime.now(UTC))
    if page is not None:
        scores = [(one.task, one.accuracies, one.median) for one in status.scores()]
        text = fleet_page(f"Fleet of {folder.name}", page_sections(status), scores)
        write_file(page, text.encode("utf-8", "backslashreplace"))
    if json_:
        print_json(as_json(status))
    else:
        print_status(status)
    if status.needs_somebody:
        raise typer.Exit(NEEDS_SOMEBODY)


@speaks_plainly
def log_command(
    log: Annotated[
        Path, typer.Argument(metavar="LOG", help="A device's log.jsonl, or the folder it lies in.")
    ],
) -> None:
    """Show what a device did and why, and check that no line of its log was changed or taken out."""
    from edgemerge.errors import FormatError
    from edgemerge.site.log import read_events

    path = log / "log.jsonl" if log.is_dir() else log
    if not path.is_file():
        raise FormatError("there is no such log; give a device's log.jsonl", path=path)
    n_lines = 0
    for event in read_events(path):
        n_lines += 1
        model, why = (str(event.get(key) or "") for key in ("id", "reason"))
        what = " ".join(str(event.get(key, "")) for key in ("time", "event"))
        print(plain(f"{what:<32} {model:<16} {why or event.get('found', '')}").rstrip())
    print(
        f"{plain(str(path))}: no line of {n_lines} was changed, and none taken out before the last"
    )


GROUP = {"status": status_command, "log": log_command}
