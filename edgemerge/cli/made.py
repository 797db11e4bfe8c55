"""How, of what, where and when a merge was made: for `merge --json` and `--report`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "describe_made", "made_rows"]


def describe_made(output: Path) -> dict[str, Any]:
    """Read a finished output's own provenance, and add what it leaves out: versions, machine, date."""
    from importlib.metadata import version

    from edgemerge.finding.json_objects import parse_object
    from edgemerge.formats import open_model
    from edgemerge.formats.inspection import read_provenance

    with closing(open_model(output)) as source:
        provenance = read_provenance(source.metadata())
    assert provenance is not None  # it was just written
    recipe = parse_object(provenance.recipe.encode(), output)
    return {
        "recipe": recipe,
        "seed": provenance.seed,
        "inputs": [
            {"name": name, "crc32": crc32, "is_base": i == 0 and recipe.get("base") is not None}
            | ({"hub": hub} if hub else {})
            for i, (name, crc32, hub) in enumerate(provenance.inputs_from())
        ],
        "versions": {
            "edgemerge": provenance.version,
            "python": platform.python_version(),
            "numpy": version("numpy"),
        },
        "machine": describe_machine(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_machine() -> str:
    """Name the board, its processor, cores and memory."""
    from edgemerge.runtime.board.device import read_board
    from edgemerge.sizes import format_size

    board = read_board()
    named = ", ".join(filter(None, (board.name, board.processor, board.architecture)))
    return f"{named}, {board.cores} cores, {format_size(board.memory.total)} of memory"


def made_rows(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say the same in rows for people."""
    from edgemerge.recipe.words import describe_recipe

    rows = [("asked", line) for line in describe_recipe(made["recipe"])]
    rows += [
        (
            "base" if one["is_base"] else "input",
            ", ".join(filter(None, (one["name"], f"checksum {one['crc32']}", one.get("hub")))),
        )
        for one in made["inputs"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return [
        *rows,
        ("versions", versions),
        ("machine", made["machine"]),
        ("finished", made["finished"]),
    ]
