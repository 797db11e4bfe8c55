"""`edgemerge eval`: how many questions models answer right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import loading, request
from edgemerge.cli.eval_tables import print_csv, print_tables
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.tasks import (
    Context,
    HelpTasks,
    Tasks,
    Texts,
    read_tasks,
    refuse_twins,
    require_questions,
)
from edgemerge.cli.terminal import plain, print_json, progress_bar, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.runtime.evaluation.results import Results
    from edgemerge.runtime.evaluation.suite import Answered, Bar, Request
    from edgemerge.runtime.llama import Model

__all__ = ["eval_command"]


@speaks_plainly
def eval_command(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL.gguf...", help="GGUF files, or org/name:TYPE.")
    ],
    task: Tasks = None,
    perplexity: Texts = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help="Worked examples in each prompt [default: 5 with --fewshot]."
        ),
    ] = None,
    fewshot: Annotated[
        list[Path] | None,
        typer.Option(
            "--fewshot",
            metavar="FILE",
            help="Where the first K examples are: one file, or one for each --task in order.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ask N questions of each task, at random."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of --limit.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT.json",
            help="Also write all answers there; the same command goes on where it was stopped.",
        ),
    ] = None,
    force: request.Force = False,
    context: Context = None,
    threads: loading.Threads = None,
    gpu_layers: loading.GpuLayers = None,
    lora: loading.Loras = None,
    rpc: loading.Rpc = None,
    i_trust_this_network: loading.TrustNetwork = False,
    cluster: request.EvalCluster = None,
    json_: request.Json = False,
    csv_: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    models_folder: ModelsFolder = None,
    download: Download = False,
    _files: HelpTasks = False,
) -> None:
    """Score models on multiple-choice questions, as lm-evaluation-harness does, and on texts.

    An option's score is its log-likelihood after the question; acc is the share of questions whose
    right option scores highest, acc_norm the same per character of the option. Further models are
    compared with the first.
    """
    from edgemerge.cluster.address import read_cluster
    from edgemerge.formats.files import real_path
    from edgemerge.output.file import check_output
    from edgemerge.runtime.evaluation import suite as evaluation
    from edgemerge.runtime.library import load_library
    from edgemerge.runtime.model_files import open_gguf

    if json_ and csv_:
        raise typer.BadParameter("--json and --csv are two ways to print the same: give one")
    workers = loading.parse_rpc(rpc, i_trust_this_network)
    if cluster is not None:
        if workers:
            raise typer.BadParameter("--rpc and --cluster both send the work away: give one")
        read_cluster(cluster)
    require_questions(task, perplexity)
    finder = make_finder(models_folder, download, quiet=json_)
    models = [finder.find_model(str(model)) for model in models]
    refuse_twins("model", models)
    refuse_twins("--perplexity", perplexity or [])
    tasks = read_tasks(task or [], shots, fewshot or [], limit, seed)
    asked = evaluation.Request(tuple(models), tasks, tuple(perplexity or ()), context)
    adapters = (one.path for one in loading.parse_loras(lora))
    inputs = (*models, *asked.texts, *(one.path for one in tasks), *(fewshot or ()), *adapters)
    real_inputs = tuple(real_path(path) for path in inputs)

    def check() -> None:
        if output is not None:
            check_output(output, real_inputs, force=force)

    check()
    for path in models:
        open_gguf(path).close()  # the last one is bad: say so now, not after an hour
    load_library()  # where it is missing, it has no version for the header either
    header = _header(asked, limit, seed, gpu_layers, lora)
    if workers:  # whose processors may round otherwise
        header["rpc"] = list(workers)

    def load(path: Path) -> Model:
        return loading.load(path, threads, gpu_layers, lora, workers)

    def bar(label: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return progress_bar(label, quiet=json_, unit=unit)

    with _open_results(output, header, force=force) as results:
        if cluster is None:
            evaluation.run(asked, results, load, bar)
        else:
            _run_on_cluster(cluster, asked, results, bar, threads, gpu_layers, lora)
        answers, texts = evaluation.answered(asked, results), evaluation.text_scores(asked, results)
        found = evaluation.document(answers, texts)
        rows = zip(found["results"], answers, strict=True)
        detailed = [{**row, "questions": evaluation.question_records(one)} for row, one in rows]
        results.publish({**header, **found, "results": detailed}, check)
    _warn_of_cuts(answers)
    if json_:
        print_json({**header, **found, "output": None if output is None else str(output)})
    elif csv_:
        print_csv(found)
    else:
        print_tables(asked.models, answers, texts)


def _run_on_cluster(
    cluster: str,
    asked: Request,
    results: Results,
    bar: Bar,
    threads: int | None,
    gpu_layers: int | None,
    lora: list[str] | None,
) -> None:
    from edgemerge.runtime.evaluation.on_cluster import run_on_cluster

    adapters = loading.parse_loras(lora)
    with loading.open_answering(cluster, threads) as connection:
        notes = run_on_cluster(
            asked, results, connection, bar, gpu_layers=gpu_layers, loras=adapters
        )
    for note in notes:
        _say(note)


# -- what to score -----------------------------------------------------------------------------------


def _header(
    asked: Request, limit: int | None, seed: int, gpu_layers: int | None, lora: list[str] | None
) -> dict[str, Any]:
    """All that results depend on; a stopped run goes on only where this is the same."""
    from importlib.metadata import version

    from edgemerge.formats.files import real_path
    from edgemerge.runtime.evaluation.results import identify, identify_adapter, sha256_of

    loras = loading.parse_loras(lora)
    return {
        "edgemerge": version("edgemerge"),
        "llama_cpp_python": version("llama_cpp_python"),
        "models": [identify(asked.place_of(path)) for path in asked.models],
        "loras": [
            {**identify_adapter(one.path, asked.models[0]), "scale": one.scale} for one in loras
        ],
        "tasks": [
            {
                "name": task.name,
                "path": str(asked.real[task.path]),
                "sha256": sha256_of(asked.real[task.path]),
                "n": len(task.questions),
                "n_total": task.n_total,
                "shots": task.n_shots,
                "examples": None if task.examples is None else str(real_path(task.examples)),
                "examples_sha256": None if task.examples is None else sha256_of(task.examples),
            }
            for task in asked.tasks
        ],
        "texts": [
            {"path": str(asked.real[path]), "sha256": sha256_of(asked.place_of(path))}
            for path in asked.texts
        ],
        "limit": limit,
        "seed": seed,
        "context": asked.n_ctx,
        "gpu_layers": gpu_layers,
    }


# -- a run that can be stopped -----------------------------------------------------------------------


@contextmanager
def _open_results(output: Path | None, header: dict[str, Any], *, force: bool) -> Iterator[Results]:
    """Results in memory, or on disk where a stopped run goes on; say so."""
    from edgemerge.runtime.evaluation.results import Results, ResultsFile

    if output is None:
        with Results() as results:
            yield results
        return
    with ResultsFile(output, header, force=force) as journal:
        if journal.note:
            _say(f"{journal.path}: {journal.note}")
        if journal.n_resumed:
            _say(f"{journal.path}: going on after {journal.n_resumed} results of an earlier run")
        try:
            yield journal
        except KeyboardInterrupt as error:
            done = sum(map(len, journal.entries.values()))
            error.add_note(f"the same command goes on after the {done} results in {journal.path}")
            raise


def _warn_of_cuts(answers: Sequence[Answered]) -> None:
    for one in answers:
        if one.n_cut:
            _say(
                f"{one.n_cut} of {len(one.found)} prompts of {one.task.name} are longer than the context "
                f"of {one.model} and lost their beginning"
            )


def _say(sentence: str) -> None:
    print(f"note: {plain(sentence)}", file=sys.stderr)
