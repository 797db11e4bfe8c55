"""`edgemerge extract`: a LoRA adapter of what an expert changed of its base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import plain, print_json, progress_bar, speaks_plainly

__all__ = ["extract_command"]


@speaks_plainly
def extract_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model it was tuned from.")],
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="The fine-tuned model.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR | OUT.gguf",
            help="A folder for PEFT, or a file for llama.cpp's --lora.",
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=1,
            metavar="R",
            help="Rank of the factors [default: 16, with --energy at most 128].",
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            metavar="PART",
            help="Choose each matrix's rank so that this part of its change is kept, e.g. 0.95.",
        ),
    ] = None,
    dtype: request.FactorType = "F32",
    memory: request.Memory = None,
    threads: request.Threads = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    force: request.Force = False,
    json_: request.Json = False,
) -> None:
    """Extract a LoRA adapter: what to add to BASE to have EXPERT, as nearly as its rank allows."""
    from edgemerge.merging.extraction import extract
    from edgemerge.merging.run import usable_processors
    from edgemerge.sizes import format_size, parse_size

    factor_type = request.read_factor_type(dtype)
    if energy is not None and not 0.0 < energy <= 1.0:
        raise typer.BadParameter("--energy must be above 0 and at most 1")
    find = make_finder(models_folder, download, quiet=json_).find_model
    models = find(base), find(expert)
    with progress_bar(f"extract -> {output.name}", quiet=json_, unit="elements") as progress:
        found = extract(
            *models,
            output,
            rank=rank,
            energy=energy,
            dtype=factor_type,
            memory=parse_size(memory) if memory is not None else None,
            threads=threads or usable_processors(),
            force=force,
            progress=progress,
        )
    if json_:
        print_json(asdict(found) | {"output": str(found.output)})
        return
    least, most = found.ranks
    ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
    print(f"{plain(str(found.output))}  {format_size(found.out_bytes)}, {dtype.upper()}")
    vectors = f", and {found.vectors} whole vectors" if found.vectors else ""
    print(f"  {found.matrices} matrices of {ranks}{vectors}")
    print(f"  {100 * found.kept:.4g} % of the change is kept (sum of squares)")
    for note in found.notes:
        print(f"  note: {plain(note)}")
