"""`edgemerge transplant`: a model with the tokenizer of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.merge import print_report
from edgemerge.cli.terminal import progress_bars, speaks_plainly

__all__ = ["transplant_command"]


@speaks_plainly
def transplant_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that gets a tokenizer.")],
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="The model that has it.")],
    output: request.Output,
    k: Annotated[
        int,
        typer.Option(
            "--k",
            min=1,
            metavar="K",
            help="Common tokens that a new token is a combination of, at most.",
        ),
    ] = 64,
    out_format: request.Format = None,
    out_type: request.Type = None,
    memory: request.Memory = None,
    threads: request.Threads = None,
    split: request.Split = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    force: request.Force = False,
    json_: request.Json = False,
) -> None:
    """Give MODEL the tokenizer of DONOR; rows of new tokens are found by orthogonal matching pursuit."""
    from edgemerge.merging.transplant import transplant
    from edgemerge.recipe.recipe import make_recipe
    from edgemerge.sizes import parse_size

    finder = make_finder(models_folder, download, quiet=json_)
    recipe, given = (
        make_recipe("passthrough", [(name, None)], out_type=out_type, finder=finder)
        for name in (model, donor)
    )
    recipe = replace(recipe, tokenizer_source=str(given.models()[0]))
    recipe, path = request.with_output(recipe, output, out_format)
    with progress_bars(f"transplant -> {path.name}", quiet=json_) as (progress, begin_part):
        report = transplant(
            recipe,
            path,
            k=k,
            memory=parse_size(memory) if memory is not None else None,
            threads=threads,
            split_bytes=parse_size(split) if split is not None else None,
            force=force,
            progress=progress,
            begin_part=begin_part,
        )
    print_report(report, as_json=json_)
