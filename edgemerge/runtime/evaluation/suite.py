"""Several models on several tasks: the loop that scores, and the document it makes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgemerge.formats.files import real_path
from edgemerge.formats.gguf.model import parts_of
from edgemerge.runtime.evaluation.evaluate import Mark, Score, compare, mark, score
from edgemerge.runtime.evaluation.likelihood import Likelihoods, score_questions
from edgemerge.runtime.evaluation.perplexity import (
    Chunk,
    Perplexity,
    cut_text,
    perplexity_of,
    score_chunks,
)
from edgemerge.runtime.evaluation.results import Results
from edgemerge.runtime.evaluation.tasks import Task
from edgemerge.runtime.llama import Model

__all__ = [
    "CHUNK",
    "Answered",
    "Request",
    "Show",
    "TextScore",
    "answered",
    "document",
    "pairs",
    "question_records",
    "run",
    "score_task",
    "score_text",
    "text_scores",
]

CHUNK = 512  # tokens, llama-perplexity's default

Show = Callable[[int, int], None]
Bar = Callable[[str, str], AbstractContextManager[Show]]


@dataclass(frozen=True, slots=True)
class Request:
    """What to score.

    Attributes
    ----------
    models : tuple of Path
        GGUF files.
    tasks : tuple of Task
        Benchmarks.
    texts : tuple of Path
        Text files for perplexity.
    n_ctx : int or None
        Tokens of context; None for the model's own in tasks, and `chunk` in texts.
    chunk : int
        Tokens of a chunk of a text, where nothing else is asked for.
    real : mapping of Path to Path
        Where the paths of models, tasks and texts led when this was made. It takes hours to score, and a link
        such as a site's `current.gguf` may lead elsewhere by then.
    """

    models: tuple[Path, ...]
    tasks: tuple[Task, ...]
    texts: tuple[Path, ...]
    n_ctx: int | None
    chunk: int = CHUNK
    real: Mapping[Path, Path] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        paths = (*self.models, *(task.path for task in self.tasks), *self.texts)
        object.__setattr__(self, "real", {path: _follow(path) for path in paths})

    @property
    def text_chunk(self) -> int:
        """Tokens of a chunk of a text."""
        return self.n_ctx or self.chunk

    def place_of(self, path: Path) -> Path:
        """Return what to open for a model or text: where a link led; else, and of a split, the path."""
        real = self.real[path]
        is_alone = len(parts_of(path)) == 1  # the parts of a split are found by their names
        return real if is_alone and str(real) != os.path.abspath(path) else path

    def leads_elsewhere(self, path: Path) -> bool:
        """Say whether a model's or text's path is a link that was moved since this was made."""
        return _follow(path) != self.real[path]

    def job_of(self, model: Path, what: Task | Path) -> str:
        """Name a model's results on a task (its file and name) or on a text."""
        if isinstance(what, Path):
            return f"{self.real[model]} | {self.real[what]}"
        return f"{self.real[model]} | {self.real[what.path]} | {what.name}"


def _follow(path: Path) -> Path:
    """Return where a path leads; a pipe (`/dev/fd/63`) leads to no file."""
    real = real_path(path)
    return real if real.is_file() else path


@dataclass(frozen=True, slots=True)
class Answered:
    """A model's answers to a task."""

    model: Path
    task: Task
    found: tuple[Likelihoods, ...]
    marks: tuple[Mark, ...]
    score: Score

    @property
    def n_cut(self) -> int:
        """Prompts that lost their beginning."""
        return sum(one.cut for one in self.found)


@dataclass(frozen=True, slots=True)
class TextScore:
    """A model's perplexity on a text."""

    model: Path
    text: Path
    perplexity: Perplexity


def run(request: Request, results: Results, load: Callable[[Path], Model], bar: Bar) -> None:
    """Score all that `results` does not have yet.

    Parameters
    ----------
    request : Request
        What to score.
    results : Results
        Where scores go, after every batch.
    load : function
        Path -> loaded Model, which is closed here.
    bar : function
        (label, unit) -> context manager of a function (done, total), which may raise to stop.

    Raises
    ------
    EdgemergeError
        A model cannot be loaded or does not fit a task; a result cannot be written.
    """
    for path in request.models:
        with load(request.place_of(path)) as model:
            for task in request.tasks:
                job = request.job_of(path, task)
                with bar(f"{path.stem}: {task.name}", "questions") as show:
                    _run_task(model, task, request.n_ctx, results, job, show)
            for text in request.texts:
                job = request.job_of(path, text)
                with bar(f"{path.stem}: {text.name}", "chunks") as show:
                    chunks = cut_text(model, request.place_of(text), request.text_chunk)
                    _run_text(model, chunks, results, job, show)


def _run_task(
    model: Model, task: Task, n_ctx: int | None, results: Results, job: str, show: Show
) -> None:
    done = results.entries.setdefault(job, {})
    total = len(task.questions)
    show(len(done), total)
    for finished in score_task(model, task, n_ctx, frozenset(done)):
        for index, value in finished:
            results.add(job, index, value)
        results.flush()
        show(len(done), total)


def _run_text(
    model: Model, chunks: Sequence[Sequence[int]], results: Results, job: str, show: Show
) -> None:
    done = results.entries.setdefault(job, {})
    show(len(done), len(chunks))
    for index, value in _score_chunks(model, chunks, frozenset(done)):
        results.add(job, index, value)
        results.flush()
        show(len(done), len(chunks))


def score_task(
    model: Model, task: Task, n_ctx: int | None, skip: Collection[int]
) -> Iterator[list[tuple[int, Any]]]:
    """Score a task's questions; yield, batch by batch, what `Results.add` takes of each.

    Parameters
    ----------
    model : Model
        A loaded model.
    task : Task
        With the questions.
    n_ctx : int, optional
        Tokens of context.
    skip : collection of int
        Indices of questions that need no score; a batch may have some of them too.
    """
    for finished in score_questions(model, task.questions, n_ctx=n_ctx, skip=skip):
        yield [(i, [one.totals, one.n_tokens, one.cut]) for i, one in finished.items()]


def score_text(
    model: Model, text: Path, n_ctx: int, skip: Collection[int]
) -> Iterator[tuple[int, Any]]:
    """Score a text's chunks; yield what `Results.add` takes of each that is not to be skipped."""
    yield from _score_chunks(model, cut_text(model, text, n_ctx), skip)


def _score_chunks(
    model: Model, chunks: Sequence[Sequence[int]], skip: Collection[int]
) -> Iterator[tuple[int, Any]]:
    for index, chunk in score_chunks(model, chunks, skip=skip):
        yield index, [chunk.nll, chunk.nll_squared, chunk.n]


def answered(request: Request, results: Results) -> list[Answered]:
    """Mark the answers, by task and then by model.

    Parameters
    ----------
    request : Request
        What was scored.
    results : Results
        All of its scores.
    """
    marked = []
    for task in request.tasks:
        for model in request.models:
            entries = results.entries[request.job_of(model, task)]
            found = []
            for index in range(len(task.questions)):
                totals, n_tokens, cut = entries[index]
                found.append(Likelihoods(tuple(totals), tuple(n_tokens), cut))
            marks = tuple(mark(*pair) for pair in zip(task.questions, found, strict=True))
            total = score(task.questions, found)
            marked.append(Answered(model, task, tuple(found), marks, total))
    return marked


def text_scores(request: Request, results: Results) -> list[TextScore]:
    """Sum up perplexities, by text and then by model.

    Parameters
    ----------
    request : Request
        What was scored.
    results : Results
        All of its scores.
    """
    return [
        TextScore(
            model,
            text,
            perplexity_of(
                Chunk(*sums)
                for _, sums in sorted(results.entries[request.job_of(model, text)].items())
            ),
        )
        for text in request.texts
        for model in request.models
    ]


def document(answers: Sequence[Answered], texts: Sequence[TextScore]) -> dict[str, Any]:
    """Say all results in the words of JSON; what is no number there is null.

    Parameters
    ----------
    answers : sequence of Answered
        By task and then by model.
    texts : sequence of TextScore
        By text and then by model.

    Returns
    -------
    dict
        `results`, `comparisons` of each model with the first, and `perplexity`.
    """
    return {
        "results": [
            {
                "model": str(one.model),
                "task": one.task.name,
                "n": one.score.n,
                "acc": one.score.acc,
                "acc_stderr": _finite(one.score.stderr),
                "acc_norm": one.score.acc_norm,
                "acc_norm_stderr": _finite(one.score.stderr_norm),
                "loss": one.score.loss,
                "n_cut": one.n_cut,
            }
            for one in answers
        ],
        "comparisons": [
            {
                "task": second.task.name,
                "first": str(first.model),
                "second": str(second.model),
                **asdict(compare(first.marks, second.marks)),
            }
            for first, second in pairs(answers)
        ],
        "perplexity": [
            {
                "model": str(one.model),
                "text": str(one.text),
                "perplexity": one.perplexity.value,
                "stderr": one.perplexity.stderr,
                "n_tokens": one.perplexity.n_tokens,
                "n_chunks": one.perplexity.n_chunks,
            }
            for one in texts
        ],
    }


def pairs(answers: Sequence[Answered]) -> Iterator[tuple[Answered, Answered]]:
    """Pair each model's answers with those of the first model to the same task.

    Parameters
    ----------
    answers : sequence of Answered
        By task and then by model.
    """
    firsts: dict[tuple[Path, str], Answered] = {}
    for one in answers:
        first = firsts.setdefault((one.task.path, one.task.name), one)
        if first is not one:
            yield first, one


def question_records(one: Answered) -> list[dict[str, Any]]:
    """List a model's answers, question by question.

    Parameters
    ----------
    one : Answered
        To a task.

    Returns
    -------
    list of dict
        The question's place in the file (from 0), its own id if it has one, the log-likelihoods of its
        options, the options chosen by acc and acc_norm, the right one.
    """
    rows = zip(one.task.indices, one.task.questions, one.found, one.marks, strict=True)
    return [
        {
            "index": index,
            **({} if question.id is None else {"id": question.id}),
            "log_likelihoods": list(found.totals),
            "n_tokens": list(found.n_tokens),
            "chosen": marked.chosen,
            "chosen_norm": marked.chosen_norm,
            "answer": question.answer,
            "right": marked.right,
            "right_norm": marked.right_norm,
            "cut": found.cut,
        }
        for index, question, found, marked in rows
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
