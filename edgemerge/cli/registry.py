"""Options of the commands that read a registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["State", "Trust"]

Trust = Annotated[
    Path,
    typer.Option(
        "--trust",
        metavar="ROOT.json",
        help="The registry's root, which you got by a way that you trust.",
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="DIR",
        help="Folder of what this machine has seen of the registry, by which old files are refused "
        "[default: in ~/.cache/edgemerge/registries].",
    ),
]
