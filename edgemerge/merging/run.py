"""Runs a plan: every tensor through a worker, into one GGUF, or into the files of a split one.

Read top-down. `merge` plans, and looks for what an interrupted run left (`edgemerge.output.resume`). The
worker pool makes the rest (`edgemerge.merging.workers`). Then `merge` writes the header and gives the file
its name.
The result is the same for every budget and thread count, and however often the merge was interrupted.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.budget import floor_bytes
from edgemerge.errors import RecipeError
from edgemerge.formats import OpenModels
from edgemerge.formats.adapters.reference import model_name
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.machine.control_group import usable_processors
from edgemerge.merging.destination import check_destination, check_split, find_destination
from edgemerge.merging.making import Inputs, Outcome, finish, make_tensors
from edgemerge.merging.precompile import precompile
from edgemerge.merging.stages import merge_stages, note_finished, read_finished
from edgemerge.merging.tasks import open_input
from edgemerge.merging.warnings import foresee_warnings
from edgemerge.output.journal import journal_path
from edgemerge.output.report import MergeReport, peak_rss_bytes
from edgemerge.output.resume import find_fingerprint
from edgemerge.planning.importance import list_matrices
from edgemerge.planning.mixtures import open_with_gates
from edgemerge.planning.plan import DEFAULT_MEMORY, make_plan
from edgemerge.planning.planned import PlannedSource
from edgemerge.types import BeginPart, Plan, Progress, Recipe, Source, ignore_parts

if TYPE_CHECKING:  # only a cluster pays for the import
    from edgemerge.cluster.connection import Connection

__all__ = ["Progress", "merge", "plan", "usable_processors"]


def plan(recipe: Recipe, *, memory: int | None = None, threads: int | None = None) -> Plan:
    """Decide a merge without doing it; reads headers, and of tensors only the factors of NVFP4 weights.

    Parameters
    ----------
    recipe : Recipe
        From `load_recipe` or `make_recipe`.
    memory : int, optional
        Budget in bytes for the whole process, with all that it holds now; else the recipe's, else
        512 MiB.
    threads : int, optional
        Workers at most; else the processors that this process may use.

    Raises
    ------
    EdgemergeError
        The recipe, a file, the models together or the budget are wrong.
    """
    floor = floor_bytes()
    planned: dict[Path, Source] = {}  # results of stages

    def plan_one(one: Recipe) -> Plan:
        with ExitStack() as stack:
            models = OpenModels(stack)
            return make_plan(
                replace(one, stages=()),
                lambda path: planned.get(path) or open_input(one, path, stack, models),
                memory=memory,
                threads=threads or usable_processors(),
                floor=floor,
            )

    stages = []
    for stage in recipe.stages:
        stages.append(plan_one(stage))
        path = Path(str(stage.name))
        planned[path] = PlannedSource(stages[-1], path)
    return replace(plan_one(recipe), recipe=recipe, stages=tuple(stages))


def merge(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    memory: int | None = None,
    threads: int | None = None,
    split_bytes: int | None = None,
    force: bool = False,
    disk: int | None = None,
    progress: Progress | None = None,
    begin_part: BeginPart = ignore_parts,
    warn: Callable[[str], None] | None = None,
    opened: Mapping[Path, Source] | None = None,
    record: Mapping[str, bytes] | None = None,
    cluster: str | None = None,
) -> MergeReport:
    """Merge models into one GGUF file, a split one, or a Hugging Face directory.

    Parameters
    ----------
    recipe : Recipe
        From `load_recipe` or `make_recipe`.
    output : path
        The file or directory to make; it gets its name only when it is whole.
    memory, threads : int, optional
        As for `plan`.
    split_bytes : int, optional
        Write OUT-00001-of-00003.gguf and so on instead of OUT.gguf, with at most so many bytes of
        tensors in each, as llama.cpp's gguf-split does. In a directory 5 GB are the default.
    force : bool
        Replace an existing output; a directory only if edgemerge wrote all that is in it.
    disk : int, optional
        Bytes that the results of a recipe's stages may take beside the output; else what is free.
    progress : callable, optional
        Called with bytes done and bytes in all, from this thread.
    begin_part : callable, optional
        Called where this begins: to read back what an earlier run finished, to align heads, to match
        neurons, to hash the output. What it returns is told how far that is.
    warn : callable, optional
        Called before the work with each sentence on what is probably not meant. Those on work of an
        earlier run that is dropped are in the report's notes too.
    opened : mapping of Path to Source, optional
        What is read in place of the models of these paths; the caller closes it.
    record : mapping of GGUF key to typed value, optional
        What the metadata says more; with other values no earlier run is continued.
    cluster : str, optional
        Address of a Dask scheduler whose workers make the tensors, as tcp://HOST:PORT; or local:N for N
        processes of this machine, each with the budget. `opened` is not for other processes.

    Returns
    -------
    MergeReport
        What was done, and what it took.

    Raises
    ------
    EdgemergeError
        See `edgemerge.errors`; the output is as it was.

    Notes
    -----
    A merge that is stopped, or whose disk fails, leaves its finished tensors beside the output: the same
    call goes on with them.
    """
    output = Path(output)
    if cluster is not None and opened:
        raise RecipeError(
            "a cluster opens models by their paths; give no open ones", field="opened"
        )
    check_destination(
        recipe, output, recipe.inputs(), is_split=split_bytes is not None, force=force
    )
    with ExitStack() as stack:
        connection = None
        if cluster is not None:
            connection = _connect(cluster, recipe, memory, threads, stack)
        merge_one = partial(
            _merge_one,
            memory=memory,
            threads=threads,
            begin_part=begin_part,
            warn=warn,
            connection=connection,
        )
        if not recipe.stages:
            return merge_one(
                recipe,
                output,
                split_bytes=split_bytes,
                force=force,
                progress=progress,
                given=opened,
                record=record,
            )
        the_plan = plan(recipe, memory=memory, threads=threads)
        if split_bytes is not None and recipe.out_format == "gguf":
            check_split(the_plan, output, split_bytes, force=force)
        return merge_stages(
            the_plan,
            output,
            merge_one,
            disk=disk,
            force=force,
            split_bytes=split_bytes,
            progress=progress,
            begin_part=begin_part,
        )


def _connect(
    cluster: str, recipe: Recipe, memory: int | None, threads: int | None, stack: ExitStack
) -> Connection:
    from edgemerge.cluster.connection import open_cluster  # only a cluster pays for the import

    return stack.enter_context(
        open_cluster(
            cluster,
            memory=memory or recipe.memory or DEFAULT_MEMORY,
            threads=threads or usable_processors(),
        )
    )


def _merge_one(
    recipe: Recipe,
    output: Path,
    *,
    memory: int | None,
    threads: int | None,
    force: bool,
    progress: Progress | None,
    begin_part: BeginPart,
    warn: Callable[[str], None] | None,
    connection: Connection | None = None,
    split_bytes: int | None = None,
    mark: Path | None = None,
    given: Mapping[Path, Source] | None = None,
    record: Mapping[str, bytes] | None = None,
) -> MergeReport:
    """Merge a recipe without stages; `mark` is beside a stage, `record` goes into the metadata."""
    started = time.monotonic()
    floor = floor_bytes()  # before the models are opened, whose headers the plan counts
    with ExitStack() as stack:
        opened: dict[Path, Source] = {}
        models = OpenModels(stack)

        def convert(model: Recipe, target: Path) -> MergeReport:
            return _merge_one(
                model,
                target,
                memory=memory,
                threads=threads,
                force=True,
                progress=begin_part("making a GGUF of the base"),
                begin_part=ignore_parts,
                warn=None,
            )

        def open_once(path: Path) -> Source:
            if recipe.mixture is not None:
                opened[path] = open_with_gates(recipe, recipe.mixture, output, stack, convert)
            else:
                opened[path] = (given or {}).get(path) or open_input(recipe, path, stack, models)
            return opened[path]

        the_plan = make_plan(
            recipe,
            open_once,
            memory=memory,
            threads=threads or usable_processors(),
            floor=floor,
        )
        the_plan = replace(the_plan, metadata={**the_plan.metadata, **(record or {})})
        matrices = {
            path: stack.enter_context(closing(ImportanceMatrix(path)))
            for path in list_matrices(the_plan.jobs, recipe)
        }
        destination = find_destination(the_plan, opened, output, split_bytes, force=force)
        layouts, paths = destination.lay_out([]), destination.paths()
        inputs = Inputs(list(opened.values()), matrices)
        fingerprint = find_fingerprint(
            the_plan, layouts, paths, inputs.sources, list(matrices.values())
        )
        named = destination.find_finished(fingerprint)
        finished = None if mark is None else read_finished(mark, destination.path, fingerprint)
        if finished is not None:
            note = "an earlier run had finished it"
            outcome = Outcome(finished, (), (note,), len(the_plan.jobs), the_plan.workers)
        elif named is not None:
            outcome = finish(the_plan, named, journal_path(destination.path), begin_part)
        else:
            precompile(the_plan)
            parts = destination.open(stack, fingerprint)
            if warn is not None:
                for sentence in (*foresee_warnings(the_plan, inputs.sources), *parts.notes):
                    warn(sentence)
            destination.check()  # again, as the part file now locks others out
            outcome = make_tensors(
                the_plan, inputs, parts, destination, progress, begin_part, connection
            )
        if mark is not None and finished is None:
            note_finished(mark, destination.path, fingerprint, outcome.sha256)
    return MergeReport(
        output=destination.path,
        out_bytes=sum(layout.n_bytes for layout in layouts),
        method=recipe.title,
        models=tuple(model_name(path) for path in the_plan.models),
        type_bytes=_type_bytes(the_plan),
        file_type=the_plan.file_type,
        tensors=len(the_plan.jobs),
        elements=the_plan.n_elements,
        seconds=time.monotonic() - started,
        budget_bytes=the_plan.budget,
        peak_rss_bytes=peak_rss_bytes(),
        read_bytes=outcome.read_bytes,
        written_bytes=outcome.written_bytes,
        passes=max((job.passes for job in the_plan.jobs), default=0),
        workers=outcome.workers,
        resumed_tensors=outcome.n_resumed,
        damaged_tensors=outcome.n_damaged,
        sha256=outcome.sha256,
        notes=the_plan.notes + outcome.notes,
        files=tuple(destination.final(file) for file in outcome.files)
        if destination.lists_files
        else (),
    )


def _type_bytes(the_plan: Plan) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for job in the_plan.jobs:
        sizes[job.out.dtype] += job.out.nbytes
    return dict(sizes.most_common())
