"""`edgemerge convert`: a merge of one model."""

from __future__ import annotations

from typing import Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.finding import Download, KeepRemote, ModelsFolder, make_finder
from edgemerge.cli.merge import print_report, run_merge
from edgemerge.cli.terminal import speaks_plainly

__all__ = ["convert_command"]


@speaks_plainly
def convert_command(
    model: Annotated[
        str,
        typer.Argument(
            help="GGUF file, Hugging Face directory, org/name, or address (https://, hf://, s3://, sftp://); "
            "with a LoRA adapter, MODEL+ADAPTER."
        ),
    ],
    output: request.Output,
    out_format: request.Format = None,
    out_type: request.Type = None,
    tensor_type: request.TensorTypes = None,
    imatrix: request.Imatrix = None,
    memory: request.Memory = None,
    threads: request.Threads = None,
    split: request.Split = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    keep_remote: KeepRemote = None,
    force: request.Force = False,
    json_: request.Json = False,
) -> None:
    """Convert one model: Hugging Face to GGUF and back, or GGUF to another type."""
    from edgemerge.recipe.recipe import make_recipe

    recipe = make_recipe(
        "passthrough",
        [(model, None)],
        out_type=out_type,
        tensor_types=request.read_tensor_types(tensor_type),
        imatrix=imatrix,
        finder=make_finder(models_folder, download, quiet=json_, streams=True, keep=keep_remote),
    )
    recipe, path = request.with_output(recipe, output, out_format)
    label = f"convert -> {path.name}"
    result = run_merge(
        recipe, path, memory, threads, split=split, label=label, force=force, quiet=json_
    )
    print_report(result, as_json=json_)
