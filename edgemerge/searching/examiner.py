"""Asks a model a portion of the questions: right answers by task, perplexity by text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.runtime.evaluation.evaluate import Mark, mark
from edgemerge.runtime.evaluation.likelihood import score_questions
from edgemerge.runtime.evaluation.perplexity import Chunk, cut_text, score_chunks
from edgemerge.runtime.evaluation.suite import CHUNK
from edgemerge.runtime.evaluation.tasks import Task
from edgemerge.runtime.llama import Model
from edgemerge.searching.portions import LEAST, RUNGS, divide, divide_task
from edgemerge.types import BeginPart

__all__ = ["Ask", "Examiner", "ask_here"]

Ask = Callable[[Model, Sequence[Task], int | None, BeginPart], Mapping[str, list[Mark]]]
"""Asks a model tasks, with so many tokens of context; gives the marks of each, by its name."""


class Examiner:
    """All questions and texts of a search, divided.

    Parameters
    ----------
    tasks : sequence of Task
        Each with a name of its own.
    texts : mapping of str to Path
        Texts for perplexity, by name.
    held_out : float
        Fraction for the end.
    seed : int
        Of the division.
    n_ctx : int, optional
        Tokens of context, as for `eval`.
    ask : callable, optional
        Asks the questions; by default this process does.

    Raises
    ------
    FormatError
        A task has too few questions.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        texts: Mapping[str, Path],
        *,
        held_out: float,
        seed: int,
        n_ctx: int | None,
        ask: Ask | None = None,
    ) -> None:
        self._ask_tasks = ask or ask_here
        self._texts, self._held_out, self._seed, self._n_ctx = texts, held_out, seed, n_ctx
        divided = [divide_task(task, held_out, seed) for task in tasks]
        self._rungs = [[rungs[i] for rungs, _ in divided] for i in range(len(RUNGS))]
        self._last = [last for _, last in divided]

    def count(self) -> dict[str, tuple[int, int]]:
        """Return for each task how many questions are for trials, and how many for the end."""
        tried = [
            sum(len(rung[i].questions) for rung in self._rungs) for i in range(len(self._last))
        ]
        return {
            task.name: (n, len(task.questions)) for task, n in zip(self._last, tried, strict=True)
        }

    def ask_rung(self, model: Model, rung: int, answers: Answers, begin_part: BeginPart) -> None:
        """Ask what is new in a rung, and add it to the answers to those before."""
        self._ask(model, self._rungs[rung], rung, answers, begin_part)

    def ask_last(self, model: Model, begin_part: BeginPart) -> Answers:
        """Ask the questions that are for the end."""
        answers = Answers()
        self._ask(model, self._last, None, answers, begin_part)
        return answers

    def _ask(
        self,
        model: Model,
        tasks: Sequence[Task],
        rung: int | None,
        answers: Answers,
        begin_part: BeginPart,
    ) -> None:
        for task, marks in self._ask_tasks(model, tasks, self._n_ctx, begin_part).items():
            answers.marks.setdefault(task, []).extend(marks)
        for name, path in self._texts.items():
            show = begin_part(name, "chunks")
            answers.chunks.setdefault(name, []).extend(self._chunks(model, name, path, rung, show))

    def _chunks(
        self,
        model: Model,
        name: str,
        path: Path,
        rung: int | None,
        show: Callable[[int, int], None],
    ) -> list[Chunk]:
        chunks = cut_text(model, path, self._n_ctx or CHUNK)
        if len(chunks) < LEAST:
            raise FormatError(
                f"has {len(chunks)} chunks of {self._n_ctx or CHUNK} tokens, and a search needs {LEAST} "
                "to divide; give a longer text, or a smaller -c",
                path=path,
            )
        portions = divide(len(chunks), self._held_out, f"{self._seed} {name}")
        wanted = portions.last if rung is None else portions.rungs[rung]
        found = []
        for i, chunk in score_chunks(model, [chunks[i] for i in wanted]):
            found.append(chunk)
            show(i + 1, len(wanted))
        return found


def ask_here(
    model: Model, tasks: Sequence[Task], n_ctx: int | None, begin_part: BeginPart
) -> dict[str, list[Mark]]:
    """Ask a model in this process; see `Ask`."""
    marks = {}
    for task in tasks:
        show = begin_part(task.name, "questions")
        found: dict[int, Mark] = {}
        for finished in score_questions(model, task.questions, n_ctx=n_ctx):
            found |= {i: mark(task.questions[i], one) for i, one in finished.items()}
            show(len(found), len(task.questions))
        marks[task.name] = [found[i] for i in range(len(task.questions))]
    return marks
