"""`edgemerge merge`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgemerge.cli import request
from edgemerge.cli.answers import ask_models
from edgemerge.cli.finding import Download, KeepRemote, ModelsFolder, Spill, make_finder
from edgemerge.cli.made import describe_made, made_rows
from edgemerge.cli.method_help import HelpWithMethods
from edgemerge.cli.sign import sign_output
from edgemerge.cli.terminal import plain, print_json, progress_bars, speaks_plainly
from edgemerge.errors import EdgemergeError
from edgemerge.types import Recipe

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edgemerge.output.report import MergeReport

CLASSES = {"merge": HelpWithMethods}

__all__ = ["merge_command", "print_report", "print_warning", "run_merge"]


@speaks_plainly
def merge_command(
    models: request.Models,
    output: request.Output,
    out_format: request.Format = None,
    method: request.Method = None,
    base: request.Base = None,
    out_type: request.Type = None,
    tensor_type: request.TensorTypes = None,
    imatrix: request.Imatrix = None,
    memory: request.Memory = None,
    threads: request.Threads = None,
    seed: request.Seed = None,
    align: request.Align = None,
    neurons: request.Neurons = False,
    parameter: request.Parameter = None,
    preset: request.Preset = None,
    strict: request.Strict = False,
    split: request.Split = None,
    disk: request.Disk = None,
    cluster: request.Cluster = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    spill: Spill = None,
    keep_remote: KeepRemote = None,
    force: request.Force = False,
    json_: request.Json = False,
    report: request.Report = None,
    sign: request.Sign = None,
    ask: request.Ask = None,
    no_ask: request.NoAsk = False,
) -> None:
    """Merge models into one GGUF file or Hugging Face directory."""
    from edgemerge.cluster.address import read_cluster
    from edgemerge.formats.files import real_path
    from edgemerge.merging.destination import check_destination
    from edgemerge.output.file import check_output
    from edgemerge.provenance.signature import signature_path
    from edgemerge.reports.page import write_page

    if ask and json_:
        raise typer.BadParameter(
            "--json prints one object alone: leave out --ask, or use edgemerge run"
        )
    if no_ask and ask:
        raise typer.BadParameter("--ask and --no-ask exclude each other")
    if cluster is not None:
        read_cluster(cluster)
    key = None if sign is None else _read_key(sign)  # now, not after an hour's work

    recipe = request.read_request(
        models,
        method=method,
        base=base,
        out_type=out_type,
        seed=seed,
        align=align,
        neurons=neurons,
        parameters=parameter,
        preset=preset,
        tensor_types=tensor_type,
        imatrix=imatrix,
        strict=strict,
        finder=make_finder(
            models_folder,
            download,
            quiet=json_,
            streams=True,
            spill=spill,
            keep=keep_remote,
        ),
    )
    recipe, path = request.with_output(recipe, output, out_format)
    if recipe.out_format == "hf" and (sign is not None or ask):
        raise typer.BadParameter("--sign and --ask are for GGUF files, not for a directory")
    inputs = (*recipe.inputs(), *(real_path(Path(text)) for text in models))
    if sign is not None:
        inputs = (*inputs, real_path(sign))
    check_destination(recipe, path, inputs, is_split=split is not None, force=force)
    if key is not None:
        first = path if split is None else _first_part(recipe, path, memory, threads, split)
        check_output(signature_path(first), inputs, force=force)
    if report is not None:  # now, not after an hour's work
        if real_path(report) in (real_path(path), real_path(signature_path(path))):
            raise typer.BadParameter("-o and --report name the same file")
        check_output(report, inputs, force=force)
    label = f"{recipe.title} -> {path.name}"
    result = run_merge(
        recipe,
        path,
        memory,
        threads,
        split=split,
        disk=disk,
        label=label,
        force=force,
        quiet=json_,
        cluster=cluster,
    )
    signature = None
    with _telling(result.output):
        try:
            if report is not None:
                write_page(result, report, made_rows(describe_made(result.output)))
            if key is not None:
                signature = sign_output(result.output, key, force=force, quiet=json_)
        finally:
            print_report(result, as_json=json_, signature=signature)
        is_watched = sys.stdout is not None and sys.stdout.isatty()
        is_asked = is_watched and not no_ask and not json_ and recipe.out_format == "gguf"
        if ask or is_asked:
            ask_models(recipe, result.output, ask)


@contextmanager
def _telling(output: Path) -> Iterator[None]:
    """Have what stops the rest of the command tell that the output is there."""
    try:
        yield
    except (EdgemergeError, KeyboardInterrupt) as error:
        error.add_note(f"the merge is done, and {output} is whole")
        raise


def _first_part(
    recipe: Recipe, output: Path, memory: str | None, threads: int | None, split: str
) -> Path:
    """Name the first file of a split, which follows from the plan."""
    from edgemerge.merging.destination import split_paths
    from edgemerge.merging.run import plan
    from edgemerge.sizes import parse_size

    the_plan = plan(recipe, memory=None if memory is None else parse_size(memory), threads=threads)
    return split_paths(the_plan, output, parse_size(split))[0]


def _read_key(path: Path) -> Ed25519PrivateKey:
    from edgemerge.provenance.keys import read_private_key

    return read_private_key(path)


def run_merge(
    recipe: Recipe,
    output: Path,
    memory: str | None,
    threads: int | None,
    *,
    split: str | None,
    disk: str | None = None,
    label: str,
    force: bool,
    quiet: bool,
    cluster: str | None = None,
) -> MergeReport:
    """Merge under a progress bar, which `quiet` leaves out.

    `memory`, `split` and `disk` are sizes as the user wrote them.
    """
    from edgemerge.merging.run import merge
    from edgemerge.sizes import parse_size

    budget = parse_size(memory) if memory is not None else None
    _say_if_scarce(budget or recipe.memory)
    warned = []

    def warn(sentence: str) -> None:
        warned.append(sentence)
        print_warning(sentence)

    with progress_bars(label, quiet=quiet) as (progress, begin_part):
        report = merge(
            recipe,
            output,
            memory=budget,
            threads=threads,
            split_bytes=parse_size(split) if split is not None else None,
            disk=parse_size(disk) if disk is not None else None,
            force=force,
            progress=progress,
            begin_part=begin_part,
            warn=warn,
            cluster=cluster,
        )
    return replace(report, notes=tuple(note for note in report.notes if note not in warned))


def print_warning(sentence: str) -> None:
    """Say on stderr what may be a mistake."""
    print(f"warning: {plain(sentence)}", file=sys.stderr)


def _say_if_scarce(budget: int | None) -> None:
    """Say so where the machine, or the control group, has less memory to give than the merge may take."""
    from edgemerge.machine.process import read_process
    from edgemerge.planning.plan import DEFAULT_MEMORY
    from edgemerge.runtime.board.memory import read_memory
    from edgemerge.sizes import format_size

    wanted, free = budget or DEFAULT_MEMORY, read_memory().available
    available = free + read_process().rss  # the budget is for all that this process takes
    if free and available < wanted:
        print(
            f"note: the budget of {format_size(wanted)} is more than the {format_size(available)} "
            "of memory that can be had now; give a smaller --memory if the merge is killed",
            file=sys.stderr,
        )


def print_report(report: MergeReport, *, as_json: bool, signature: Path | None = None) -> None:
    """Say on stdout what was done."""
    signed = {} if signature is None else {"signature": str(signature)}
    if as_json:
        print_json(report.as_json() | describe_made(report.output) | signed)
        return
    print("\n".join(map(plain, report.lines())))
    if signature is not None:
        print(f"  signed in {plain(str(signature))}")
