"""`edgemerge delta`: what an expert changed of its base, in a small file that stands for the expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import plain, print_json, print_table, progress_bar, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.merging.delta import DeltaSettings
    from edgemerge.merging.delta_report import DeltaReport

__all__ = ["delta_command"]


@speaks_plainly
def delta_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model it was tuned from.")],
    expert: Annotated[
        str,
        typer.Argument(
            metavar="EXPERT", help="The fine-tuned model, a merge of some, or BASE+ADAPTER."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT.gguf", help="The delta to make.")
    ],
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            metavar="PART",
            help="Choose each matrix's bits so that this part of the change's sum of squares is kept "
            "[default: 0.95].",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="SIZE", help="Or so that the file has at most this size, e.g. 300M."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option("--bits", metavar="N", help="Or 1, 2, 3, 4, 5, 6 or 8 bits for every matrix."),
    ] = None,
    sparse: Annotated[
        float | None,
        typer.Option(
            "--sparse", metavar="PART", help="Or the largest elements, this part of each matrix."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, metavar="R", help="Or two factors of this rank."),
    ] = None,
    memory: request.Memory = None,
    threads: request.Threads = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    force: request.Force = False,
    json_: request.Json = False,
) -> None:
    """Store what EXPERT changed of BASE in few bits; with BASE the delta stands for EXPERT in a merge."""
    from edgemerge.merging.delta import make_delta
    from edgemerge.merging.run import usable_processors
    from edgemerge.sizes import parse_size

    settings = _read_settings(keep, size, bits, sparse, rank)
    find = make_finder(models_folder, download, quiet=json_).find_model
    with progress_bar(f"delta -> {output.name}", quiet=json_, unit="steps") as progress:
        found = make_delta(
            find(base),
            find(expert),
            output,
            settings,
            memory=parse_size(memory) if memory is not None else None,
            threads=threads or usable_processors(),
            force=force,
            progress=progress,
        )
    if json_:
        print_json(_as_json(found))
    else:
        _print(found)


def _read_settings(
    keep: float | None, size: str | None, bits: int | None, sparse: float | None, rank: int | None
) -> DeltaSettings:
    from edgemerge.merging.delta import BITS, DeltaSettings
    from edgemerge.sizes import parse_size

    given = {"--keep": keep, "--size": size, "--bits": bits, "--sparse": sparse, "--rank": rank}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter(f"{' and '.join(named[:2])} exclude each other; give one")
    if bits is not None and bits not in BITS:
        raise typer.BadParameter(f"--bits {bits} must be one of {', '.join(map(str, BITS))}")
    if keep is not None and not 0.0 < keep < 1.0:
        raise typer.BadParameter("--keep must be above 0 and below 1")
    if sparse is not None and not 0.0 < sparse <= 1.0:
        raise typer.BadParameter("--sparse must be above 0 and at most 1")
    nbytes = None if size is None else parse_size(size)
    return DeltaSettings(bits, sparse, rank, nbytes, keep)


def _as_json(found: DeltaReport) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(found) | {
        "output": str(found.output),
        "setting": dict([found.setting]),
        "bits": found.bits,
        "times_smaller": found.times_smaller,
        "kinds": [asdict(kind) | {"bits": kind.bits} for kind in found.kinds],
    }


def _print(found: DeltaReport) -> None:
    from edgemerge.sizes import format_size

    print(
        f"{plain(str(found.output))}  {format_size(found.out_bytes)}, {found.bits:.3g} bits per weight, "
        f"{found.times_smaller:.1f} times smaller than the expert in bf16"
    )
    print(f"  {100 * found.kept:.4g} % of the change is kept (sum of squares)")
    counts = [(found.unchanged, "unchanged"), (found.left_out, "left out as too small a change")]
    others = "".join(f", {count} {words}" for count, words in counts if count)
    workers = f"{found.workers} worker{'s' * (found.workers > 1)}"
    peak, budget = format_size(found.peak_rss_bytes), format_size(found.budget_bytes)
    print(f"  {found.tensors} tensors{others} in {found.seconds:.1f} s with {workers}")
    print(f"  memory {peak} at peak of {budget}")
    rows = [
        (
            kind.kind,
            str(kind.tensors),
            f"{kind.bits:.2f}",
            f"{100 * kind.error:.1f} %",
            format_size(kind.nbytes),
        )
        for kind in found.kinds
    ]
    header = ("kind", "tensors", "bits", "error", "size")
    print_table(header, rows, right="tensors bits error size")
    for note in found.notes:
        print(f"note: {plain(note)}")
