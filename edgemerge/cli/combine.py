"""`edgemerge combine`: one LoRA adapter of several, without their model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.terminal import plain, print_json, progress_bar, speaks_plainly

__all__ = ["combine_command"]


@speaks_plainly
def combine_command(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="PEFT directories.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to make, for PEFT.")
    ],
    how: Annotated[
        str,
        typer.Option(
            "--how",
            metavar="HOW",
            help="cat, linear, ties, dare_linear, dare_ties, magnitude_prune, svd, ties_svd, "
            "dare_linear_svd, dare_ties_svd or magnitude_prune_svd, as in peft.",
        ),
    ] = "cat",
    density: Annotated[
        float | None,
        typer.Option("--density", metavar="PART", help="Part that ties, dare and prune keep."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, metavar="R", help="Rank after svd [default: the highest]."),
    ] = None,
    by_count: Annotated[
        bool, typer.Option("--by-count", help="Elect signs by count, instead of by sum.")
    ] = False,
    dtype: request.FactorType = "F32",
    seed: request.Seed = None,
    memory: request.Memory = None,
    force: request.Force = False,
    json_: request.Json = False,
) -> None:
    """Make one LoRA adapter of several, as peft's add_weighted_adapter."""
    from edgemerge.merging.combination import combine
    from edgemerge.sizes import format_size, parse_size

    factor_type = request.read_factor_type(dtype)
    pairs = [request.split_weight(text) for text in adapters]
    with progress_bar(f"combine -> {output.name}", quiet=json_, unit="modules") as progress:
        found = combine(
            [(Path(path), 1.0 if weight is None else weight) for path, weight in pairs],
            output,
            how=how,
            density=density,
            rank=rank,
            by_count=by_count,
            seed=seed or 0,
            dtype=factor_type,
            memory=parse_size(memory) if memory is not None else None,
            force=force,
            progress=progress,
        )
    if json_:
        print_json(asdict(found) | {"output": str(found.output)})
        return
    least, most = found.ranks
    ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
    size = format_size(found.out_bytes)
    print(f"{plain(str(found.output))}  {size}, {found.modules} modules of {ranks}")
    for note in found.notes:
        print(f"  note: {plain(note)}")
