"""`edgemerge plan`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, Spill, make_finder
from edgemerge.cli.merge import print_warning
from edgemerge.cli.method_help import HelpWithMethods
from edgemerge.cli.network import network_as_json, network_lines
from edgemerge.cli.prediction import BoardName
from edgemerge.cli.terminal import plain, print_json, print_table, speaks_plainly
from edgemerge.shown_paths import shown_path
from edgemerge.types import Plan, TensorJob

CLASSES = {"plan": HelpWithMethods}

__all__ = ["plan_command"]


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
    board: BoardName = None,
    json_: request.Json = False,
) -> None:
    """Show what a merge would read, write and need, without doing it."""
    from edgemerge.cli.prediction import find_machine, prediction_as_json, prediction_lines
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
    machine = find_machine(board)
    budget = parse_size(memory) if memory is not None else recipe.memory
    # What was free when this machine was measured says nothing of now: merge does not look at it either.
    named = machine if board is not None else None
    the_plan = plan(
        request.with_format(recipe, out_format),
        memory=budget if named is None else named.budget(budget),
        threads=threads or (None if named is None else named.cores),
    )
    for sentence in warn_of_recipe(the_plan):
        print_warning(sentence)
    if json_:
        predicted = prediction_as_json(the_plan, machine)
        print_json(_as_json(the_plan) | network_as_json(the_plan, spill) | predicted)
    else:
        _print(the_plan)
        for line in (*network_lines(the_plan, spill), *prediction_lines(the_plan, machine)):
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
