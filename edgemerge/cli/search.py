"""`edgemerge search`: settings of a merge, found by trials on the user's own questions."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import loading, request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.merge import print_warning
from edgemerge.cli.search_tables import as_json, print_result, report_sections, summary
from edgemerge.cli.tasks import (
    Context,
    HelpTasks,
    Tasks,
    Texts,
    read_tasks,
    refuse_twins,
    require_questions,
)
from edgemerge.cli.terminal import plain, print_json, progress_bars, speaks_plainly
from edgemerge.errors import OutputError

if TYPE_CHECKING:
    from edgemerge.recipe.searches import SearchRecipe
    from edgemerge.runtime.evaluation.tasks import Task
    from edgemerge.runtime.llama import Model
    from edgemerge.searching.examiner import Ask
    from edgemerge.searching.objective import Objective
    from edgemerge.searching.search import Search
    from edgemerge.searching.trials import Trials
    from edgemerge.types import Recipe

__all__ = ["search_command"]


@speaks_plainly
def search_command(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE.yml",
            help="A recipe with {search: [LOW, HIGH]} in place of the numbers to be found.",
        ),
    ],
    task: Tasks = None,
    perplexity: Texts = None,
    trials: Annotated[
        int, typer.Option(min=2, metavar="N", help="Trials in all, the start included.")
    ] = 60,
    time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Start no trial after so long, e.g. 90s, 30m or 2h."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="End after N trials that were no better."),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=W",
            help="What a task counts, or a percent of perplexity or of size in points of accuracy "
            "[default: 1; 0 for size and what is to be kept]. May be repeated.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MARGIN",
            help="A task that may lose MARGIN points at most, or a text, percent. May be repeated.",
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            min=0.05, max=0.9, metavar="F", help="Fraction of the questions that no trial is asked."
        ),
    ] = 0.333,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Take N questions of each task, at random."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of all draws.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="BEST.yml",
            help="Recipe to write [default: RECIPE-best.yml]; BEST.yml.trials has the trials.",
        ),
    ] = None,
    report: request.Report = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            metavar="DIR",
            help="Folder for the models of trials, e.g. /dev/shm [default: beside BEST.yml].",
        ),
    ] = None,
    force: request.Force = False,
    context: Context = None,
    memory: request.Memory = None,
    threads: loading.Threads = None,
    gpu_layers: loading.GpuLayers = None,
    cluster: request.EvalCluster = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    strict: request.Strict = False,
    json_: request.Json = False,
    _files: HelpTasks = False,
) -> None:
    """Find the settings of a merge that answer your own questions best.

    Each trial merges with other settings and is asked few questions first. Half of the trials are
    stopped there. At the end the start and the best trial are asked the held-out questions. After an
    interrupt the same command goes on.
    """
    from edgemerge.cluster.address import read_cluster
    from edgemerge.recipe.searches import load_search
    from edgemerge.reports.search import search_page
    from edgemerge.searching.examiner import Examiner
    from edgemerge.searching.inputs import list_inputs
    from edgemerge.searching.model_file import ModelFile
    from edgemerge.searching.search import Limits, Search
    from edgemerge.searching.trials import Trials, check_optuna
    from edgemerge.sizes import parse_duration, parse_size

    check_optuna()
    if cluster is not None:
        read_cluster(cluster)
    require_questions(task, perplexity)
    limits = Limits(trials, None if time is None else parse_duration(time), patience)
    tasks = read_tasks(task or [], None, [], limit, seed)
    texts = _name_texts(perplexity or [], tasks)
    objective = _objective(weight or [], keep or [], tasks, texts)
    found = load_search(
        recipe, strict=strict, finder=make_finder(models_folder, download, quiet=json_)
    )
    output = output or recipe.with_name(f"{recipe.stem}-best.yml")
    kept = output.with_name(output.name + ".trials")
    read = list_inputs(found)
    asked = [*(one.path for one in tasks), *texts.values()]
    _check_outputs(found, read, output, kept, report, asked, force)
    budget = None if memory is None else parse_size(memory)
    _warn(found.recipe(found.start()), budget, threads)
    with ExitStack() as stack:
        ask = None
        if cluster is not None:
            ask = stack.enter_context(_ask_cluster(cluster, threads, gpu_layers))
        examiner = Examiner(tasks, texts, held_out=held_out, seed=seed, n_ctx=context, ask=ask)
        model_file = stack.enter_context(
            ModelFile(
                (scratch or output.parent) / f"{output.name}.gguf", memory=budget, threads=threads
            )
        )
        header = _header(
            found, read, tasks, texts, objective, held_out, limit, seed, context, gpu_layers
        )
        all_trials = stack.enter_context(closing(Trials(kept, found.spaces, header, seed)))
        for path in filter(None, (output, report)):
            _check_ours(all_trials, path, force)
        label = f"search {recipe.name}"
        progress, begin_part = stack.enter_context(progress_bars(label, quiet=json_, unit="trials"))
        search = Search(
            found,
            all_trials,
            model_file,
            examiner,
            objective,
            _loader(threads, gpu_layers),
            begin_part,
        )
        try:
            reason = search.run(limits, progress)
            best = search.best()
            look = search.look(best)
        except KeyboardInterrupt as error:
            error.add_note(_write_so_far(search, output, force))
            raise
        result = as_json(search, reason, best, look, output, report)
        _write(all_trials, output, search.best_text(best, list(summary(result))), force)
        if report is not None:
            _write(all_trials, report, search_page(result, report_sections(result)), force)
    if json_:
        print_json(result)
    else:
        print_result(result)


def _warn(start: Recipe, budget: int | None, threads: int | None) -> None:
    """Say what is probably not meant, such as a name that no merge looks at, or a rank that costs hours."""
    from edgemerge.merging.run import plan
    from edgemerge.merging.warnings import warn_of_recipe

    for note in start.notes:
        print(f"note: {plain(note)}", file=sys.stderr)
    for sentence in warn_of_recipe(plan(start, memory=budget, threads=threads)):
        print_warning(sentence)


@contextmanager
def _ask_cluster(cluster: str, threads: int | None, gpu_layers: int | None) -> Iterator[Ask]:
    """Have a cluster answer; tell at the end what the user should know of it."""
    from edgemerge.searching.on_cluster import ClusterAsker

    with loading.open_answering(cluster, threads) as connection:
        ask = ClusterAsker(connection, gpu_layers)
        yield ask
    for note in ask.notes:
        print(f"note: {plain(note)}", file=sys.stderr)


def _loader(threads: int | None, gpu_layers: int | None) -> Any:
    """Load models with so many threads, or as many as there are cores: the same for all trials."""
    from edgemerge.runtime.board.device import default_threads
    from edgemerge.runtime.library import load_library

    load_library()  # where it is missing, say so before the work

    def load(path: Path) -> Model:
        return loading.load(path, threads or default_threads(), gpu_layers)

    return load


# -- what is asked and wanted ------------------------------------------------------------------------


def _name_texts(paths: Sequence[Path], tasks: Sequence[Task]) -> dict[str, Path]:
    from edgemerge.searching.objective import SIZE

    texts = {path.stem: path for path in paths}
    taken = {SIZE, *(task.name for task in tasks)}
    if len(texts) < len(paths) or taken & texts.keys():
        raise typer.BadParameter(
            "a text of --perplexity is called as another text, a task, or size; rename its file"
        )
    return texts


def _objective(
    weights: Sequence[str], keeps: Sequence[str], tasks: Sequence[Task], texts: Mapping[str, Path]
) -> Objective:
    from edgemerge.searching.objective import SIZE, Objective

    names = [*(task.name for task in tasks), *texts]
    kept = dict(_pair("--keep", text, names) for text in keeps)
    given = dict(_pair("--weight", text, [*names, SIZE]) for text in weights)
    refuse_twins("NAME of --keep", [text.partition("=")[0] for text in keeps])
    refuse_twins("NAME of --weight", [text.partition("=")[0] for text in weights])
    found = {name: given.get(name, 0.0 if name in kept else 1.0) for name in names}
    found[SIZE] = given.get(SIZE, 0.0)
    if not any(found[name] for name in names):
        raise typer.BadParameter(
            "every task and text has the weight 0, as what is to be kept has; "
            f"give another --task, or --weight {names[0]}=1"
        )
    return Objective(found, kept)


def _pair(option: str, text: str, names: Sequence[str]) -> tuple[str, float]:
    import math

    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if name not in names or not math.isfinite(number) or number < 0:
        raise typer.BadParameter(
            f"{option} {text!r}: give NAME=NUMBER, a number from 0 for one of {', '.join(names)}"
        )
    return name, number


def _check_outputs(
    found: SearchRecipe,
    read: Sequence[Path],
    output: Path,
    kept: Path,
    report: Path | None,
    asked: Sequence[Path],
    force: bool,
) -> None:
    """Refuse outputs that cannot be written, or a place where the best recipe would not be one."""
    from edgemerge.formats.files import real_path
    from edgemerge.output.file import check_output
    from edgemerge.searching.inputs import list_inputs

    inputs = (*read, *(real_path(path) for path in (found.path, *asked)))
    goes_on = kept.is_file()  # then `_check_ours` sees whether an earlier run wrote the recipe
    check_output(output, inputs, force=force or goes_on)
    check_output(kept, inputs, force=goes_on)
    if report is not None:
        if real_path(report) in (real_path(output), real_path(kept)):
            raise OutputError("is the output too; choose another --report", path=report)
        check_output(report, inputs, force=force or goes_on)
    if list_inputs(found, output) != read:
        raise OutputError(
            f"lies where the models of {found.path} are not found by their names; give an -o beside "
            "that recipe",
            path=output,
        )


def _check_ours(all_trials: Trials, path: Path, force: bool) -> None:
    """Refuse to replace what no run of this command has written, or what was changed since."""
    from edgemerge.runtime.evaluation.results import sha256_of

    if not force and path.exists() and sha256_of(path) not in all_trials.outputs:
        raise OutputError(
            "exists, and this search has not written it so; rename it, or give --force to replace it",
            path=path,
        )


def _write(all_trials: Trials, path: Path, text: str, force: bool) -> None:
    """Write an output, known to a later run as one of this search."""
    from hashlib import sha256

    from edgemerge.output.file import write_file

    _check_ours(all_trials, path, force)  # again, as a search takes hours
    raw = text.encode("utf-8", "backslashreplace")
    all_trials.note_output(sha256(raw).hexdigest())
    write_file(path, raw)


def _header(
    found: SearchRecipe,
    read: Sequence[Path],
    tasks: Sequence[Task],
    texts: Mapping[str, Path],
    objective: Objective,
    held_out: float,
    limit: int | None,
    seed: int,
    context: int | None,
    gpu_layers: int | None,
) -> dict[str, Any]:
    """All that the trials depend on; they are taken up only where this is the same."""
    from importlib.metadata import version

    from edgemerge.formats.files import real_path
    from edgemerge.runtime.evaluation.results import sha256_of
    from edgemerge.searching.inputs import mark_inputs

    return {
        "versions": [version(name) for name in ("edgemerge", "llama_cpp_python", "optuna")],
        "recipe": repr(found.document),
        "input files": mark_inputs(read),
        "tasks": [[task.name, str(real_path(task.path)), sha256_of(task.path)] for task in tasks],
        "texts": [[name, str(real_path(path)), sha256_of(path)] for name, path in texts.items()],
        "weights": dict(objective.weights),
        "margins": dict(objective.keeps),
        "held-out": held_out,
        "limit": limit,
        "seed": seed,
        "context": context,
        "gpu_layers": gpu_layers,
    }


def _write_so_far(search: Search, output: Path, force: bool) -> str:
    """Write the best recipe of an interrupted search, and say so and how to go on."""
    finished = search.trials.finished
    if not finished:
        return "no trial was over"
    best = search.best()
    so_far = f"the best of {len(finished)} trial{'s' * (len(finished) > 1)} so far"
    comment = f"{so_far}; the held-out questions were not asked"
    try:
        _write(search.trials, output, search.best_text(best, [comment]), force)
    except OutputError as error:
        return f"{error}; the same command then goes on"
    return (
        f"{output} has {so_far}, trial {best.number} with a score of {best.score or 0:.1f}; the same "
        "command goes on"
    )
