"""`edgemerge imatrix`: how much each column of a model's weights matters for a text."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli import loading, request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import plain, print_json, progress_bar, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.output.importance_file import Squares

__all__ = ["imatrix_command"]

CHUNK = 512  # tokens, llama-imatrix's default


@speaks_plainly
def imatrix_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL.gguf", help="GGUF file, or org/name:TYPE.")
    ],
    text: Annotated[
        Path, typer.Argument(metavar="TEXT", help="Plain text, like what it will read.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT.gguf | OUT.dat",
            help="Importance matrix to make; .dat is the older form.",
        ),
    ],
    chunks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Read N chunks of the text [default: all]."),
    ] = None,
    context: Annotated[
        int,
        typer.Option("-c", "--ctx", min=1, metavar="N", help="Tokens of a chunk."),
    ] = CHUNK,
    batch: Annotated[
        int | None,
        typer.Option(
            "-b",
            "--batch",
            min=1,
            metavar="N",
            help="Tokens that are computed at a time; fewer take less memory [default: a chunk].",
        ),
    ] = None,
    with_output: Annotated[
        bool, typer.Option("--process-output", help="Measure output.weight too.")
    ] = False,
    threads: loading.Threads = None,
    gpu_layers: loading.GpuLayers = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    force: request.Force = False,
    json_: request.Json = False,
) -> None:
    """Measure how much each column of a model's matrices matters: an importance matrix.

    It is llama-imatrix's. convert and merge quantise by it (--imatrix), and the method hierarchical weighs
    experts by theirs (weighting: importance).
    """
    from edgemerge.formats.files import real_path
    from edgemerge.output.file import check_output
    from edgemerge.output.importance_file import write_importances
    from edgemerge.runtime.activations import measure_importances
    from edgemerge.runtime.evaluation.perplexity import cut_text
    from edgemerge.sizes import format_size

    path = make_finder(models_folder, download, quiet=json_).find_model(model)
    check = partial(check_output, output, (real_path(path), real_path(text)), force=force)
    check()
    if output.suffix not in (".gguf", ".dat"):
        raise typer.BadParameter(
            f"-o {output}: end the name in .gguf, or in .dat for the older form"
        )
    started = time.monotonic()
    with (
        loading.load(path, threads, gpu_layers) as loaded,
        progress_bar(f"imatrix -> {output.name}", quiet=json_, unit="chunks") as progress,
    ):
        cut = cut_text(loaded, text, context, purpose="importance")[:chunks]
        squares = measure_importances(
            loaded,
            cut,
            n_batch=min(batch or context, context),
            with_output=with_output,
            progress=progress,
        )
    n_bytes = write_importances(output, squares, dataset=text, n_ctx=context, check=check)
    seconds, notes = time.monotonic() - started, _notes(squares)
    if json_:
        print_json(
            {
                "output": str(output),
                "out_bytes": n_bytes,
                "tensors": len(squares),
                "chunks": len(cut),
                "context": context,
                "seconds": seconds,
                "notes": notes,
            }
        )
        return
    print(f"{plain(str(output))}  {format_size(n_bytes)}, importances of {len(squares)} tensors")
    print(f"  {len(cut)} chunks of {context} tokens in {seconds:.1f} s")
    for note in notes:
        print(f"  note: {plain(note)}")


def _notes(squares: dict[str, Squares]) -> list[str]:
    """Say of which experts nothing was seen."""
    unseen = {name: int((entry.counts == 0).sum()) for name, entry in squares.items()}
    total = sum(unseen.values())
    if not total:
        return []
    n_experts = sum(entry.counts.size for name, entry in squares.items() if unseen[name])
    tensors = sum(map(bool, unseen.values()))
    return [
        f"{total} of {n_experts} matrices of experts in {tensors} tensors were never chosen, and all "
        "their columns matter alike; give a longer text"
    ]
