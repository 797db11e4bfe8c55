"""`edgemerge rollback`: the model before serves again."""

from __future__ import annotations

import getpass
import os
from typing import Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.terminal import speaks_plainly
from edgemerge.cli.update import SiteFile, open_server, print_report

__all__ = ["rollback_command"]


@speaks_plainly
def rollback_command(
    site: SiteFile,
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Why, for the log.")
    ] = "by command",
    json_: request.Json = False,
) -> None:
    """Let the model that served before serve again, at once, and note who said so.

    It exits with 1 where a running server does not take that model; restart the server then.
    The next update does not try the same model again, unless something in SITE.yml or its files changes.
    """
    from edgemerge.fleet.examination import LlamaExaminer
    from edgemerge.fleet.ingredients import FileHashes
    from edgemerge.fleet.site_file import read_site
    from edgemerge.fleet.switch import roll_back_by_hand
    from edgemerge.site.folder import SiteFolder

    declared = read_site(site)
    examiner = LlamaExaminer(declared, SiteFolder(declared.folder), FileHashes(None))
    report = roll_back_by_hand(declared, examiner, open_server(declared), reason=reason, by=_user())
    print_report(report, as_json=json_)
    if report.server_differs:
        raise typer.Exit(1)


def _user() -> str:
    """Name who asked; a container may have a user without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"
