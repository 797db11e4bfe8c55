"""`edgemerge align`: which of one model's attention heads is which of another's, layer by layer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.alignment.records import HeadPlan, Skipped
from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import (
    check_picture,
    plain,
    print_json,
    progress_bar,
    speaks_plainly,
)
from edgemerge.types import Source

if TYPE_CHECKING:
    from edgemerge.cli.align_tables import Neurons, Plans

__all__ = ["align_command"]

LITTLE = 0.8  # mean cost above which two models' heads have hardly anything in common


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an alignment means for a merge."""

    name: str  # in_place, reordered, unrelated or skipped
    finding: str  # in a few words, for the picture's title
    sentence: str


@dataclass(frozen=True, slots=True)
class Work:
    """What an alignment may use: decided before any tensor is read."""

    budget: int
    workers: int
    arena_bytes: int
    layers: tuple[tuple[int, int], ...]
    read_bytes: int


@speaks_plainly
def align_command(
    reference: Annotated[str, typer.Argument(metavar="A", help="The model that stays.")],
    model: Annotated[str, typer.Argument(metavar="B", help="The model whose heads are found.")],
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE.png", help="Also draw the distances of all heads, per layer."
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Also find rotated values and reordered neurons."),
    ] = False,
    memory: request.Memory = None,
    threads: request.Threads = None,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, max=2**64 - 1, metavar="N", help="Seed of the sketches."),
    ] = 0,
    models_folder: ModelsFolder = None,
    download: Download = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing picture.")] = False,
    json_: request.Json = False,
) -> None:
    """Find the attention heads of model A in model B, layer by layer."""
    from edgemerge.cli.align_tables import print_layers, print_more
    from edgemerge.formats import open_model
    from edgemerge.merging.precompile import precompile_kernels
    from edgemerge.merging.run import usable_processors
    from edgemerge.planning.compatibility import check_models
    from edgemerge.planning.vocabulary import compare_tokenizers
    from edgemerge.sizes import parse_size

    started = time.monotonic()
    budget = parse_size(memory) if memory is not None else None
    finder = make_finder(models_folder, download, quiet=json_)
    paths = (finder.find_model(reference), finder.find_model(model))
    if plot is not None:  # now, not after the work
        check_picture(plot, paths, force=force)
    sources: list[Source] = []
    try:
        for path in paths:
            sources.append(open_model(path))
        notes = check_models(sources, by_text=True)  # heads do not depend on tokens
        notes += compare_tokenizers(*sources)
        how = "full" if full else "hard"
        precompile_kernels("linear", how, read=_attention_types(sources), written={"F32"})
        work = _plan(
            sources[0], sources[1], budget, threads or usable_processors(), plot is not None, full
        )
        plans = _align(sources[0], sources[1], work, seed, full=full, quiet=json_)
        neurons = _match(sources[0], sources[1], seed, quiet=json_) if full else None
    finally:
        for source in sources:
            source.close()
    names = _names(paths)
    verdict = _judge(plans, *names)
    if plot is not None:
        from edgemerge.reports.plots import draw_alignment

        draw_alignment(plans, plot, reference=names[0], model=names[1], verdict=verdict.finding)
    if json_:
        document = _as_json(paths, plans, neurons, verdict, work, seed)
        print_json(
            {
                **document,
                "seconds": time.monotonic() - started,
                "plot": None if plot is None else str(plot),
                "notes": notes,
            }
        )
    else:
        print(plain(verdict.sentence))
        print_layers(plans, names)
        if neurons is not None:
            print_more(plans, neurons)
        for note in notes:
            print(f"note: {plain(note)}")
        if plot is not None:
            print(f"drawn in {plot}")


# -- the work ----------------------------------------------------------------------------------------


def _attention_types(sources: Sequence[Source]) -> set[str]:
    """Types that will be decoded."""
    from edgemerge.formats.quants.codec import CODECS

    specs = (spec for source in sources for spec in source.specs().values())
    return {spec.dtype for spec in specs if ".attn_" in spec.name and spec.dtype in CODECS}


def _plan(
    reference: Source, other: Source, budget: int | None, threads: int, plotted: bool, full: bool
) -> Work:
    """Divide the budget among workers, or refuse it with the smallest that works."""
    from edgemerge.alignment.heads import arena_need, layer_geometry, rotations_need
    from edgemerge.alignment.neurons import neuron_need
    from edgemerge.alignment.records import LayerHeads
    from edgemerge.alignment.sketch import sketched_names
    from edgemerge.budget import FLOOR_BYTES, MIB, SOLVER_BYTES, WORKER_BYTES
    from edgemerge.errors import BudgetError
    from edgemerge.formats.adapters.adapted import reading_bytes
    from edgemerge.planning.memory import header_bytes
    from edgemerge.planning.plan import DEFAULT_MEMORY
    from edgemerge.reports.plots import drawing_bytes
    from edgemerge.sizes import format_size

    geometry = [
        (source, heads) for source in (reference, other) for heads in layer_geometry(source)
    ]
    layers = tuple((layer, layer) for layer in sorted({heads.layer for _, heads in geometry}))
    least, useful = arena_need(reference, other, layers, rotates=full)
    kept, read_again = rotations_need(reference, other, layers) if full else (0, 0)
    models = [reference, other]
    fixed = FLOOR_BYTES + SOLVER_BYTES + 2 * header_bytes(models)
    if plotted:
        fixed += drawing_bytes(len(layers))
    fixed += kept
    reading = reading_bytes(models)
    beside = WORKER_BYTES + reading
    least += beside
    most = max(least, neuron_need(reference, other) + reading) if full else least
    budget = DEFAULT_MEMORY if budget is None else budget
    if fixed + most > budget:
        needed = -(-(fixed + most) // MIB)
        raise BudgetError(
            f"a budget of {format_size(budget)} is too small for this alignment; "
            f"the smallest that works is --memory {needed}MiB",
            needed=needed * MIB,
            budget=budget,
        )
    workers = max(1, min(threads, len(layers), (budget - fixed) // least))
    arena_bytes = min(useful, (budget - fixed) // workers - beside)
    read_bytes = sum(
        source.specs()[name].nbytes
        for source, heads in geometry
        if isinstance(heads, LayerHeads)
        for name in sketched_names(heads)
    )
    return Work(budget, workers, arena_bytes, layers, read_bytes + read_again)


def _align(
    reference: Source, other: Source, work: Work, seed: int, *, full: bool, quiet: bool
) -> Plans:
    from edgemerge.alignment.heads import align_models

    label = f"align {other.path.name}"
    with progress_bar(label, quiet=quiet) as progress:
        return align_models(
            reference,
            other,
            seed=seed,
            arena_bytes=work.arena_bytes,
            threads=work.workers,
            layers=work.layers,
            on_read=_adder(progress, work.read_bytes),
            rotates=full,
        )


def _match(reference: Source, other: Source, seed: int, *, quiet: bool) -> Neurons:
    from edgemerge.alignment.neurons import match_neurons

    with progress_bar(f"neurons of {other.path.name}", quiet=quiet, unit="layers") as progress:
        return match_neurons(reference, other, seed=seed, progress=progress)


def _adder(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Sum what workers read up, for a callback that wants the sum."""
    lock = threading.Lock()
    done = 0

    def add(n_bytes: int) -> None:
        nonlocal done
        with lock:
            done += n_bytes
            progress(done, total)

    return add


# -- what it means ---------------------------------------------------------------------------------


def _names(paths: tuple[Path, Path]) -> tuple[str, str]:
    """Name two models by their last part, where that tells them apart."""
    first, second = (path.absolute().name for path in paths)
    return (first, second) if first != second else (str(paths[0]), str(paths[1]))


def _judge(plans: Plans, reference: str, model: str) -> Verdict:
    """Tell in one sentence what the plans mean for a merge."""
    aligned = [plan for plan in plans if isinstance(plan, HeadPlan)]
    skipped = [plan for plan in plans if isinstance(plan, Skipped)]
    if not aligned:
        finding = "no layer can be aligned"
        reason = plain(skipped[0].reason) if skipped else "there are none"
        return Verdict("skipped", finding, f"{finding} ({reason}): a merge leaves heads in place")
    reordered = [plan for plan in aligned if not plan.is_identity]
    costs = [plan.identity_cost if plan.is_identity else plan.cost for plan in aligned]
    cost = sum(costs) / len(costs)
    if reordered:
        finding = f"heads are in another order in {len(reordered)} of {len(aligned)} layers"
        doubt = f", though they stay far apart (cost {cost:.2f} of 1)" if cost > LITTLE else ""
        return Verdict("reordered", finding, f"{finding}: merge with --align hard{doubt}")
    if cost > LITTLE:
        finding = f"heads have little in common (cost {cost:.2f} of 1)"
        return Verdict("unrelated", finding, f"{finding}: no order of them helps a merge")
    return Verdict(
        "in_place",
        "heads are where they were",
        f"{model}'s heads are where {reference}'s are: alignment changes nothing",
    )


def _as_json(
    paths: Sequence[Path],
    plans: Plans,
    neurons: Neurons | None,
    verdict: Verdict,
    work: Work,
    seed: int,
) -> dict[str, Any]:
    """Return what was found; of neurons only where they were asked for."""
    from edgemerge.cli.align_tables import layer_document, neuron_document
    from edgemerge.output.report import peak_rss_bytes

    return {
        "reference": str(paths[0]),
        "model": str(paths[1]),
        "verdict": verdict.name,
        "summary": verdict.sentence,
        "layers": [layer_document(plan) for plan in plans],
        "seed": seed,
        "workers": work.workers,
        "budget_bytes": work.budget,
        "peak_rss_bytes": peak_rss_bytes(),
        **({} if neurons is None else {"neurons": [neuron_document(plan) for plan in neurons]}),
    }
