"""`edgemerge merge` and `edgemerge plan`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgemerge.cli import request
from edgemerge.cli.answers import ask_models
from edgemerge.cli.finding import Download, KeepRemote, ModelsFolder, Spill, make_finder
from edgemerge.cli.made import describe_made, made_rows
from edgemerge.cli.method_help import HelpWithMethods
from edgemerge.cli.network import network_as_json, network_lines
from edgemerge.cli.sign import sign_output
from edgemerge.cli.terminal import plain, print_json, print_table, progress_bars, speaks_plainly
from edgemerge.shown_paths import shown_path
from edgemerge.types import Plan, Recipe, TensorJob

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edgemerge.output.report import MergeReport

CLASSES = {"merge": HelpWithMethods, "plan": HelpWithMethods}

__all__ = ["merge_command", "plan_command", "print_report", "run_merge"]


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
    if key is not None and split is None:
        check_output(signature_path(path), inputs, force=force)
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
    if report is not None:
        write_page(result, report, made_rows(describe_made(result.output)))
    signature = None if key is None else sign_output(result.output, key, force=force, quiet=json_)
    print_report(result, as_json=json_, signature=signature)
    is_watched = sys.stdout is not None and sys.stdout.isatty()
    is_asked = is_watched and not no_ask and not json_ and recipe.out_format == "gguf"
    if ask or is_asked:
        ask_models(recipe, result.output, ask)


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
        _print_warning(sentence)

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


def _print_warning(sentence: str) -> None:
    print(f"warning: {plain(sentence)}", file=sys.stderr)


def _say_if_scarce(budget: int | None) -> None:
    """Say so where the machine, or the control group, has less memory to give than the merge may take."""
    from edgemerge.planning.plan import DEFAULT_MEMORY
    from edgemerge.process import read_process
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


@speaks_plainly
def plan_command(
    models: request.Models,
    out_format: request.PlannedFormat = None,
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
    models_folder: ModelsFolder = None,
    download: Download = False,
    spill: Spill = None,
    json_: request.Json = False,
) -> None:
    """Show what a merge would read, write and need, without doing it."""
    from edgemerge.merging.run import plan
    from edgemerge.merging.warnings import warn_of_recipe
    from edgemerge.sizes import parse_size

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
        finder=make_finder(models_folder, download, quiet=json_, streams=True, spill=spill),
    )
    the_plan = plan(
        request.with_format(recipe, out_format),
        memory=parse_size(memory) if memory is not None else None,
        threads=threads,
    )
    for sentence in warn_of_recipe(the_plan):
        _print_warning(sentence)
    if json_:
        print_json(_as_json(the_plan) | network_as_json(the_plan, spill))
    else:
        _print(the_plan)
        for line in network_lines(the_plan, spill):
            print(plain(line))


def _as_json(the_plan: Plan) -> dict[str, object]:
    return {
        "method": the_plan.recipe.title,
        "models": [shown_path(path) for path in _models_of(the_plan)],
        "file_type": the_plan.file_type,
        "tensors": len(the_plan.jobs),
        "elements": the_plan.n_elements,
        "read_bytes": the_plan.read_bytes,
        "written_bytes": the_plan.written_bytes,
        "passes": max((job.passes for job in the_plan.jobs), default=0),
        "budget_bytes": the_plan.budget,
        "needed_bytes": the_plan.needed_bytes,
        "workers": the_plan.workers,
        "arena_bytes": the_plan.arena_bytes,
        "notes": list(the_plan.notes),
        "stages": [
            {"name": stage.recipe.name, **_as_json(stage), "jobs": []} for stage in the_plan.stages
        ],
        "jobs": [
            {
                "tensor": job.out.name,
                "shape": list(job.out.shape),
                "from": [tensor.spec.dtype for tensor in job.inputs],
                "to": job.out.dtype,
                "passes": job.passes,
                "rows_per_block": job.rows_per_block,
            }
            for job in the_plan.jobs
        ],
    }


def _print(the_plan: Plan) -> None:
    from edgemerge.sizes import format_count, format_size

    blocks = the_plan.workers * the_plan.arena_bytes
    if the_plan.stages:
        _print_stages(the_plan)
    _print_models(the_plan)
    _print_asked(the_plan)
    rows = []
    for label, jobs in _groups(the_plan.jobs):
        job = jobs[0]
        rows.append(
            (
                label,
                f"{len(jobs)} x [{', '.join(map(str, job.out.shape))}]",
                " ".join(dict.fromkeys(tensor.spec.dtype for tensor in job.inputs)),
                job.out.dtype + (" (copied)" if job.is_byte_copy else ""),
                str(job.passes),
                format_size(sum(j.out.nbytes for j in jobs)),
            )
        )
    print_table(("tensor", "shape", "from", "to", "reads", "size"), rows, right="reads size")
    print(
        f"{len(the_plan.jobs)} tensors, {format_count(the_plan.n_elements)} parameters: "
        f"reads {format_size(the_plan.read_bytes)}, writes {format_size(the_plan.written_bytes)}"
    )
    print(
        f"memory: needs {format_size(the_plan.needed_bytes)} of {format_size(the_plan.budget)}: "
        f"{format_size(the_plan.needed_bytes - blocks)} for Python, kernels and headers, "
        f"{the_plan.workers} x {format_size(the_plan.arena_bytes)} for blocks"
    )
    for note in the_plan.notes:
        print(f"note: {plain(note)}")


def _models_of(the_plan: Plan) -> tuple[Path, ...]:
    """List the models that are read; of a mixture, those that become one."""
    mixture = the_plan.recipe.mixture
    return the_plan.models if mixture is None else mixture.models()


def _print_models(the_plan: Plan) -> None:
    models = _models_of(the_plan)
    has_base = the_plan.recipe.base is not None or the_plan.recipe.mixture is not None
    print(f"{the_plan.recipe.title} of {len(models)} models to {the_plan.file_type}")
    for i, path in enumerate(models):
        stage = "" if path.is_absolute() else "stage "
        print(f"  {'base  ' if i == 0 and has_base else 'model '} {stage}{plain(shown_path(path))}")


def _print_asked(the_plan: Plan) -> None:
    """Say the settings, defaults marked, and what each model has of its own."""
    from edgemerge.recipe.words import describe_recipe, recipe_document

    for line in describe_recipe(recipe_document(the_plan.recipe)):
        if ": " in line:
            print(f"  {plain(line)}")


def _print_stages(the_plan: Plan) -> None:
    """Say what is made first, and what it takes of the disk until the output is finished."""
    from edgemerge.sizes import format_size

    for stage in the_plan.stages:
        print(
            f"stage {plain(str(stage.recipe.name))}: {stage.recipe.method} of {len(stage.models)} "
            f"models to {stage.file_type}, reads {format_size(stage.read_bytes)}, writes "
            f"{format_size(stage.written_bytes)}"
        )
        for note in stage.notes:
            if note not in the_plan.notes:
                print(f"  note: {plain(note)}")
    total = sum(stage.written_bytes for stage in the_plan.stages)
    print(
        f"the stages take {format_size(total)} of disk in OUT.gguf.stages until the merge is done"
    )


def _groups(jobs: Iterable[TensorJob]) -> Iterable[tuple[str, list[TensorJob]]]:
    """Put the same tensor of all layers into one row, where shape, types and passes agree."""
    groups: dict[tuple[object, ...], list[TensorJob]] = {}
    for job in jobs:
        stem = re.sub(r"^blk\.\d+\.", "blk.*.", job.out.name)
        types = tuple(tensor.spec.dtype for tensor in job.inputs)
        groups.setdefault((stem, job.out.shape, types, job.out.dtype, job.passes), []).append(job)
    return [(str(key[0]), found) for key, found in groups.items()]
