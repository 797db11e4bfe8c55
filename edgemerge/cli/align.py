"""`edgemerge align`: which of one model's attention heads is which of another's, layer by layer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from edgemerge.alignment.records import HeadPlan, Skipped
from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import (
    check_picture,
    plain,
    print_json,
    print_table,
    progress_bar,
    span,
    speaks_plainly,
)
from edgemerge.types import Source

__all__ = ["align_command"]

LITTLE = 0.8  # mean cost above which two models' heads have hardly anything in common
MAX_SHOWN = 60  # characters of a permutation in the table

Plans = Sequence[HeadPlan | Skipped]


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
    from edgemerge.formats import open_model
    from edgemerge.merging.precompile import precompile_kernels
    from edgemerge.merging.run import usable_processors
    from edgemerge.planning.compatibility import check_models
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
        notes = check_models(sources)
        precompile_kernels("linear", "hard", read=_attention_types(sources), written={"F32"})
        work = _plan(
            sources[0], sources[1], budget, threads or usable_processors(), plot is not None
        )
        plans = _align(sources[0], sources[1], work, seed, quiet=json_)
    finally:
        for source in sources:
            source.close()
    names = _names(paths)
    verdict = _judge(plans, *names)
    if plot is not None:
        from edgemerge.reports.plots import draw_alignment

        draw_alignment(plans, plot, reference=names[0], model=names[1], verdict=verdict.finding)
    if json_:
        document = _as_json(paths, plans, verdict, work, seed)
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
        _print(plans, names)
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
    reference: Source, other: Source, budget: int | None, threads: int, plotted: bool
) -> Work:
    """Divide the budget among workers, or refuse it with the smallest that works."""
    from edgemerge.alignment.heads import arena_need, layer_geometry
    from edgemerge.alignment.records import LayerHeads
    from edgemerge.alignment.sketch import sketched_names
    from edgemerge.budget import FLOOR_BYTES, MIB, SOLVER_BYTES, WORKER_BYTES
    from edgemerge.errors import BudgetError
    from edgemerge.planning.plan import DEFAULT_MEMORY
    from edgemerge.reports.plots import drawing_bytes
    from edgemerge.sizes import format_size

    geometry = [
        (source, heads) for source in (reference, other) for heads in layer_geometry(source)
    ]
    layers = tuple((layer, layer) for layer in sorted({heads.layer for _, heads in geometry}))
    least, useful = arena_need(reference, other, layers)
    headers = sum(len(raw) for source in (reference, other) for raw in source.metadata().values())
    fixed = FLOOR_BYTES + SOLVER_BYTES + 2 * headers
    if plotted:
        fixed += drawing_bytes(len(layers))
    least += WORKER_BYTES
    budget = DEFAULT_MEMORY if budget is None else budget
    if fixed + least > budget:
        needed = -(-(fixed + least) // MIB)
        raise BudgetError(
            f"a budget of {format_size(budget)} is too small for this alignment; "
            f"the smallest that works is --memory {needed}MiB",
            needed=needed * MIB,
            budget=budget,
        )
    workers = max(1, min(threads, len(layers), (budget - fixed) // least))
    arena_bytes = min(useful, (budget - fixed) // workers - WORKER_BYTES)
    read_bytes = sum(
        source.specs()[name].nbytes
        for source, heads in geometry
        if isinstance(heads, LayerHeads)
        for name in sketched_names(heads)
    )
    return Work(budget, workers, arena_bytes, layers, read_bytes)


def _align(reference: Source, other: Source, work: Work, seed: int, *, quiet: bool) -> Plans:
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
        )


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
    if not aligned:
        finding = "no layer can be aligned"
        reason = _reason(plans[0]) if plans else "there are none"
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


def _reason(plan: HeadPlan | Skipped) -> str:
    return plain(plan.reason) if isinstance(plan, Skipped) else ""


# -- showing it --------------------------------------------------------------------------------------


def _as_json(
    paths: Sequence[Path], plans: Plans, verdict: Verdict, work: Work, seed: int
) -> dict[str, Any]:
    from edgemerge.output.report import peak_rss_bytes

    return {
        "reference": str(paths[0]),
        "model": str(paths[1]),
        "verdict": verdict.name,
        "summary": verdict.sentence,
        "layers": [_layer_json(plan) for plan in plans],
        "seed": seed,
        "workers": work.workers,
        "budget_bytes": work.budget,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _layer_json(plan: HeadPlan | Skipped) -> dict[str, Any]:
    if isinstance(plan, Skipped):
        return {"layer": plan.layer, "skipped": plan.reason}
    return {
        "layer": plan.layer,
        "identity_cost": plan.identity_cost,
        "cost": plan.cost,
        "gap": plan.gap,
        "confidence": plan.confidence,
        "iterations": plan.iterations,
        "converged": bool(plan.converged),
        "exact": bool(plan.exact),
        "guarded": bool(plan.guarded),
        "is_identity": plan.is_identity,
        "kv_groups": list(plan.kv_groups),
        "heads": list(plan.heads),
    }


def _print(plans: Plans, names: tuple[str, str]) -> None:
    aligned = [plan for plan in plans if isinstance(plan, HeadPlan)]
    grouped = any(len(plan.heads) > len(plan.kv_groups) for plan in aligned)
    what = "group[heads]" if grouped else "heads"
    print(
        f"A is {plain(names[0])}, B is {plain(names[1])}; costs with heads in place and matched: "
        "0 equal, 1 unrelated"
    )
    header = (
        "layer",
        "in place",
        "matched",
        "gap",
        "confidence",
        "by",
        f"B's {what}, in A's order",
    )
    print_table(header, list(_rows(plans)), right="layer confidence")
    if any(_permutation(plan)[1] for plan in aligned):
        print("... is shortened: --json lists all heads")


def _rows(plans: Plans) -> Iterator[tuple[str, ...]]:
    """Write a row per layer, but one for consecutive layers whose heads stay, with their ranges."""
    for (_, said), run in groupby(plans, key=_finding):
        layers = list(run)
        first, last = layers[0].layer, layers[-1].layer
        label = f"{first}" if first == last else f"{first} to {last}"
        aligned = [plan for plan in layers if isinstance(plan, HeadPlan)]
        if not aligned:
            yield (label, "-", "-", "-", "-", "-", said)
            continue
        yield (
            label,
            span([plan.identity_cost for plan in aligned], ".4f"),
            span([plan.cost for plan in aligned], ".4f"),
            span([plan.gap for plan in aligned], ".0e"),
            span([plan.confidence for plan in aligned], ".3f"),
            _solver(aligned[0]),
            said,
        )


def _finding(plan: HeadPlan | Skipped) -> tuple[str, str]:
    """Tell what two layers must have in common to be shown in one row."""
    if isinstance(plan, Skipped):
        return "", f"skipped: {_reason(plan)}"
    alone = "" if plan.is_identity else str(plan.layer)
    return f"{_solver(plan)}{alone}", _permutation(plan)[0]


def _solver(plan: HeadPlan) -> str:
    return "exact solver" if plan.exact else "sinkhorn" if plan.converged else "sinkhorn, rough"


def _permutation(plan: HeadPlan) -> tuple[str, bool]:
    """Write a permutation for people, and tell whether it was too long for that.

    Heads in brackets belong to one KV group; groups are named where there is more than one head in each.
    """
    if plan.guarded:
        return "in place (reordering gains too little)", False
    if plan.is_identity:
        return "in place", False
    per_group = len(plan.heads) // len(plan.kv_groups)
    if per_group == 1:
        return _shorten(" ".join(map(str, plan.heads)))
    groups = []
    for i, group in enumerate(plan.kv_groups):
        heads = plan.heads[i * per_group : (i + 1) * per_group]
        groups.append(f"{group}[{' '.join(map(str, heads))}]")
    return _shorten(" ".join(groups))


def _shorten(text: str) -> tuple[str, bool]:
    if len(text) <= MAX_SHOWN:
        return text, False
    return text[: text.rindex(" ", 0, MAX_SHOWN - 3)] + " ...", True
