"""`edgemerge compare`: how two models, or what two experts changed of their base, compare."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

if TYPE_CHECKING:
    from edgemerge.merging.comparison import Comparison
    from edgemerge.merging.figures import TensorFigures

__all__ = ["compare_command"]

LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@speaks_plainly
def compare_command(
    a: Annotated[str, typer.Argument(metavar="A", help="One model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other model.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Compare what A and B changed of this model."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE.png", help="Also draw all tensors of all layers as a heat map."
        ),
    ] = None,
    memory: request.Memory = None,
    threads: request.Threads = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing picture.")] = False,
    json_: request.Json = False,
) -> None:
    """Compare two models, or what they changed of a base, tensor by tensor."""
    from edgemerge.merging.comparison import compare
    from edgemerge.merging.run import usable_processors
    from edgemerge.sizes import parse_size

    finder = make_finder(models_folder, download, quiet=json_)
    given = (a, b) if base is None else (a, b, base)
    paths = tuple(finder.find_model(one) for one in given)
    reserve = 0
    if plot is not None:  # now, not after the work
        from edgemerge.reports.plots_compare import DRAWING_BYTES

        check_picture(plot, paths, force=force)
        reserve = DRAWING_BYTES
    with progress_bar(f"compare {paths[1].name}", quiet=json_, unit="elements") as progress:
        found = compare(
            paths[0],
            paths[1],
            base=paths[2] if len(paths) > 2 else None,
            memory=parse_size(memory) if memory is not None else None,
            threads=threads or usable_processors(),
            reserve=reserve,
            progress=progress,
        )
    if plot is not None:
        from edgemerge.reports.plots_compare import draw_comparison

        draw_comparison(found, plot)
    if json_:
        print_json(_as_json(paths, found) | {"plot": None if plot is None else str(plot)})
        return
    for verdict in found.verdicts:
        print(f"{'warning: ' if verdict.is_warning else ''}{plain(verdict.sentence)}")
    _print(found)
    for note in found.notes:
        print(f"note: {plain(note)}")
    if plot is not None:
        print(f"drawn in {plot}")


def _as_json(paths: Sequence[Path], found: Comparison) -> dict[str, Any]:
    from edgemerge.output.report import peak_rss_bytes

    return {
        "a": str(paths[0]),
        "b": str(paths[1]),
        "base": str(paths[2]) if len(paths) > 2 else None,
        "verdict": found.verdicts[0].name,
        "summary": found.verdicts[0].sentence,
        "verdicts": [verdict._asdict() for verdict in found.verdicts],
        "cosine": found.total.cosine(0, 1),
        "tensors": [_tensor_json(one) for one in found.tensors],
        "notes": found.notes,
        "workers": found.workers,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _tensor_json(one: TensorFigures) -> dict[str, Any]:
    return {
        "name": one.name,
        "shape": one.shape,
        "elements": one.sums.n,
        "cosine": one.cosine,
        "norms": [one.sums.norm(0), one.sums.norm(1)],
        "norm_ratio": one.norm_ratio,
        "sign_agreement": one.sign_agreement,
        "unchanged": one.unchanged,
        "effective_rank": one.ranks,
    }


# -- the table -------------------------------------------------------------------------------------


def _print(found: Comparison) -> None:
    names, of_base = found.names, len(found.names) > 2
    what = "what they changed of it" if of_base else "their weights"
    says = f", the base is {plain(names[2])}" if of_base else ""
    print(f"A is {plain(names[0])}, B is {plain(names[1])}{says}; of {what}:")
    unchanged = ("A unchanged", "B unchanged") if of_base else ("equal",)
    ranks = ("rank of A", "rank of B") if of_base else ("rank of B - A",)
    header = ("tensor", "layers", "cosine", "norm B/A", "same sign", *unchanged, *ranks)
    print_table(header, list(_rows(found.tensors)), right="layers")


def _rows(tensors: Sequence[TensorFigures]) -> Iterator[tuple[str, ...]]:
    """Write a row per kind of tensor, and one for each run of layers with the same finding."""
    kinds: dict[str, list[tuple[str, TensorFigures]]] = {}
    for one in tensors:
        matched = LAYER.fullmatch(one.name)
        layer, kind = matched.groups() if matched else ("-", one.name)
        kinds.setdefault(kind, []).append((layer, one))
    for kind, of_kind in kinds.items():
        for _, run in groupby(of_kind, key=lambda entry: _finding(entry[1])):
            layers = list(run)
            first, last = layers[0][0], layers[-1][0]
            label = first if first == last else f"{first} to {last}"
            yield (plain(kind), label, *_cells([one for _, one in layers]))


def _finding(one: TensorFigures) -> tuple[bool, ...]:
    """Tell what tensors must have in common to be shown in one row."""
    from edgemerge.merging.verdicts import FAR, LOUD

    ratio, cosine = one.norm_ratio, one.cosine
    is_loud = ratio is not None and not 1 / LOUD < ratio < LOUD
    is_far = len(one.ranks) == 1 and cosine is not None and cosine < FAR
    return (cosine is None, is_loud, is_far, *(part == 1.0 for part in one.unchanged))


def _cells(tensors: Sequence[TensorFigures]) -> Iterator[str]:
    yield _span([one.cosine for one in tensors], ".4f")
    yield _span([one.norm_ratio for one in tensors], ".3g")
    yield _span([one.sign_agreement for one in tensors], ".1%")
    for parts in zip(*(one.unchanged for one in tensors), strict=True):
        yield _span(parts, ".1%")
    for ranks in zip(*(one.ranks for one in tensors), strict=True):
        yield _span(ranks, ".1f")


def _span(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return span(known, form) if known else "-"
