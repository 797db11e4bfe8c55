"""`edgemerge bench`: speed, latency, memory, energy and heat of models; the cost of a merge."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli import loading, request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.generation import note
from edgemerge.cli.terminal import check_stop, plain, print_json, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.finding.finder import Finder
    from edgemerge.runtime.bench.bench import BenchSettings, ModelBench
    from edgemerge.runtime.evaluation.questions import Question
    from edgemerge.runtime.evaluation.tasks import Task

__all__ = ["bench_command"]

N_PROMPT, N_GEN = 512, 128  # tokens; llama-bench's defaults
N_RUNS = 3


class Format(StrEnum):
    """How figures are printed."""

    md = "md"
    csv = "csv"
    json = "json"


def _read_format(text: str) -> Format:
    try:
        return Format(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: -o is the format, md, csv or json; redirect the output to keep it"
        ) from None


@speaks_plainly
def bench_command(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MODEL...", help="GGUF files, or org/name:TYPE.", show_default=False
        ),
    ] = None,
    n_prompt: Annotated[
        int | None,
        typer.Option(
            "-p",
            "--n-prompt",
            min=0,
            metavar="N",
            help=f"Tokens of the prompt; 0: no such test [default: {N_PROMPT}].",
        ),
    ] = None,
    n_gen: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--n-gen",
            min=0,
            metavar="N",
            help=f"Tokens to generate; 0: no such test [default: {N_GEN}].",
        ),
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option(
            "-r",
            "--repetitions",
            min=1,
            metavar="N",
            help=f"Runs of each test [default: {N_RUNS}].",
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            "-t",
            "--threads",
            metavar="N[,N]...",
            help="Numbers of threads to measure, e.g. 1,2,4 [default: the cores].",
        ),
    ] = None,
    gpu_layers: loading.GpuLayers = None,
    rpc: loading.Rpc = None,
    i_trust_this_network: loading.TrustNetwork = False,
    depth: Annotated[
        int,
        typer.Option(
            "-d", "--depth", min=0, metavar="N", help="Tokens in the KV cache before each test."
        ),
    ] = 0,
    output_format: Annotated[
        Format,
        typer.Option(
            "-o",
            "--output",
            parser=_read_format,
            metavar="md|csv|json",
            show_default=False,
            help="Format of the figures on stdout [default: md].",
        ),
    ] = Format.md,
    models_folder: ModelsFolder = None,
    download: Download = False,
    json_: request.Json = False,
    quality: Annotated[
        str | None,
        typer.Option(
            "--quality",
            metavar="NAME=FILE",
            help="Also measure accuracy on multiple-choice questions, named as for eval --task.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="Ask N questions of --quality, at random."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            help="Draw memory against speed, and quality (PNG, SVG or PDF).",
        ),
    ] = None,
    force: request.Force = False,
    merge: Annotated[
        Path | None,
        typer.Option("--merge", metavar="RECIPE.yml", help="Measure this merge instead of models."),
    ] = None,
) -> None:
    """Measure models as llama-bench does, and their latency, memory, load time, energy and heat."""
    output_format = Format.json if json_ else output_format
    if merge is not None:
        if models or plot is not None or quality is not None or limit is not None:
            raise typer.BadParameter("--merge measures a merge alone: give no models with it")
        of_models = (n_prompt, n_gen, repetitions, threads, gpu_layers, rpc, depth or None)
        if any(option is not None for option in of_models):
            raise typer.BadParameter(
                "--merge measures a merge once, as its recipe has it: -p, -n, -r, -t, -g, -d and --rpc "
                "go with models"
            )
        finder = make_finder(models_folder, download, quiet=json_)
        _bench_merge(merge, output_format, finder, models_folder)
        return
    if not models:
        raise typer.BadParameter("give one or more GGUF files, or --merge RECIPE.yml")
    if limit is not None and quality is None:
        raise typer.BadParameter("--limit goes with --quality")
    if n_prompt == n_gen == 0:
        raise typer.BadParameter("-p and -n are both 0: there is nothing to measure")
    if plot is not None:
        if n_gen == 0:
            raise typer.BadParameter("--plot shows the speed of generation: give -n")
        _check_plot(plot, models, force=force)
    workers = loading.parse_rpc(rpc, i_trust_this_network)
    finder = make_finder(models_folder, download, quiet=json_)
    models = [finder.find_model(str(model)) for model in models]
    task = _read_quality(quality, limit)
    room = _shortest_context(models) - depth
    settings = _settings(
        threads,
        _clamp("-p", N_PROMPT, room) if n_prompt is None else n_prompt,
        _clamp("-n", N_GEN, room) if n_gen is None else n_gen,
        repetitions or N_RUNS,
        depth,
        gpu_layers,
        workers,
    )
    benches = _bench_models(models, settings, task.questions if task else None, output_format)
    name = task.name if task else ""
    _print_rest(benches, name, output_format)
    if plot is not None:
        _draw(benches, name, plot)


def _shortest_context(models: list[Path]) -> int:
    """Tokens that all models were trained for; a model that is none is refused here, not after an hour."""
    from edgemerge.formats.gguf.metadata import get_value
    from edgemerge.runtime.model_files import open_gguf

    found = []
    for path in models:
        source = open_gguf(path)
        n_ctx = get_value(source.metadata(), f"{source.architecture}.context_length")
        source.close()
        found += [n_ctx] if isinstance(n_ctx, int) else []
    return min(found, default=sys.maxsize)


def _clamp(option: str, default: int, room: int) -> int:
    if not 0 < room < default:
        return default
    note(f"the context has room for {option} {room}, which stands for the usual {default}")
    return room


def _settings(
    threads: str | None,
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    depth: int,
    gpu_layers: int | None,
    workers: tuple[str, ...],
) -> BenchSettings:
    from edgemerge.runtime.bench.bench import BenchSettings
    from edgemerge.runtime.board.device import default_threads

    numbers = [default_threads()]
    if threads is not None:
        words = threads.split(",")
        numbers = [int(word) if word.strip().isdecimal() else 0 for word in words]
        if not all(0 < number <= loading.MAX_THREADS for number in numbers):
            raise typer.BadParameter(
                f"-t {threads!r} must be numbers of threads up to {loading.MAX_THREADS}, e.g. -t 1,2,4"
            )
    return BenchSettings(
        threads=tuple(dict.fromkeys(numbers)),
        n_prompt=n_prompt,
        n_gen=n_gen,
        repetitions=repetitions,
        depth=depth,
        n_gpu_layers=gpu_layers,
        rpc=workers,
    )


def _read_quality(quality: str | None, limit: int | None) -> Task | None:
    if quality is None:
        return None
    from edgemerge.runtime.evaluation.tasks import read_task

    name, equals, path = quality.partition("=")
    if not equals or not name or not path:
        raise typer.BadParameter(f"--quality {quality!r} must be NAME=FILE, e.g. medqa=test.jsonl")
    return read_task(name, path, limit=limit)


def _bench_models(
    models: list[Path],
    settings: BenchSettings,
    questions: Sequence[Question] | None,
    output_format: Format,
) -> list[ModelBench]:
    """Measure one model after the other; print the rows of each when it is done."""
    from edgemerge.cli.bench_records import csv_lines, model_record, speed_record
    from edgemerge.cli.bench_table import speed_header, speed_rows
    from edgemerge.runtime.bench.bench import bench_model

    names = max(len(path.name) for path in models) if len(models) > 1 else 0
    benches: list[ModelBench] = []
    with _status() as show:
        for path in models:
            benches.append(
                bench_model(
                    path,
                    settings,
                    questions=questions,
                    on_step=partial(_show_step, show, path),
                )
            )
            if output_format is Format.md:
                if len(benches) == 1:
                    print("\n".join(speed_header(names)))
                print("\n".join(map(plain, speed_rows(benches[-1], names))), flush=True)
            elif output_format is Format.csv:
                records = [
                    speed_record(benches[-1], speed) | model_record(benches[-1])
                    for speed in benches[-1].measured.speeds
                ]
                print(csv_lines(records, header=len(benches) == 1), flush=True)
    return benches


def _show_step(show: Callable[[str], None], path: Path, step: str) -> None:
    show(f"{path.name}: {step}")


def _print_rest(benches: list[ModelBench], name: str, output_format: Format) -> None:
    """Print what is shown for all models together."""
    from edgemerge.cli.bench_records import bench_json
    from edgemerge.cli.bench_table import bench_notes, bench_tables

    if output_format is Format.json:
        print_json(bench_json(benches, name))
    elif output_format is Format.md:
        lines = [
            "",
            *bench_tables(benches, name),
            "",
            *(f"- {n}" for n in bench_notes(benches, name)),
        ]
        print("\n".join(map(plain, lines)))


def _bench_merge(
    recipe: Path, output_format: Format, finder: Finder, models_folder: Path | None
) -> None:
    from edgemerge.cli.bench_records import csv_lines, merge_record
    from edgemerge.cli.bench_table import merge_table
    from edgemerge.merging.precompile import precompile
    from edgemerge.merging.run import plan
    from edgemerge.recipe.recipe import load_recipe
    from edgemerge.runtime.bench.merge_cost import measure_merge

    intent = load_recipe(recipe, finder=finder)
    with _status() as show:
        show("compiling kernels")
        the_plan = plan(intent)
        for one in (*the_plan.stages, the_plan):
            precompile(one)  # once per machine, and no part of what a merge costs
        show(f"merging {recipe.name}")
        cost = measure_merge(recipe, intent.inputs(), models_folder, out_format=intent.out_format)
    if output_format is Format.json:
        print_json(merge_record(cost))
    elif output_format is Format.csv:
        print(csv_lines([merge_record(cost)], header=True))
    else:
        print("\n".join(map(plain, merge_table(cost))))


def _check_plot(plot: Path, models: list[Path], *, force: bool) -> None:
    from edgemerge.formats.files import real_path
    from edgemerge.output.file import check_output
    from edgemerge.reports.plots import check_matplotlib
    from edgemerge.reports.plots_bench import FORMATS

    if plot.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"--plot {plot}: the name must end in {', '.join(FORMATS)}")
    check_matplotlib()
    check_output(plot, tuple(real_path(path) for path in models), force=force)


def _draw(benches: list[ModelBench], name: str, plot: Path) -> None:
    from edgemerge.reports.plots_bench import BenchPoint, draw_bench

    points = []
    for bench in benches:
        rates = [speed.mean for speed in bench.measured.speeds if speed.test.n_gen]
        points.append(
            BenchPoint(
                bench.path.stem,
                max(rates),
                bench.measured.memory.peak,
                None if bench.score is None else bench.score.acc,
            )
        )
    draw_bench(points, plot, quality=name)


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, while it is a terminal; stop on a signal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda text: check_stop()
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("") as status:

        def show(text: str) -> None:
            check_stop()
            status.update(escape(plain(text)))

        yield show
