"""The end of `edgemerge demo`: the same ten questions to base, experts and merge, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemerge.runtime.evaluation.evaluate import Mark
    from edgemerge.runtime.evaluation.questions import Question

__all__ = ["N_SHOWN", "SEED", "answer_lines", "print_answers"]

DOMAINS = ("disease", "substance")
N_SHOWN = 5  # questions per domain
SEED = 0  # fixed before the answers were known
WIDTH = 20  # of a column: four fit a terminal
RIGHT = "*"


def print_answers(models: Mapping[str, Path], folder: Path) -> None:
    """Ask models the same held-out questions and print what each answers.

    Parameters
    ----------
    models : mapping of str -> Path
        Title of a column -> GGUF file.
    folder : Path
        Where disease.jsonl and substance.jsonl are.

    Raises
    ------
    FormatError
        A file of questions is not as it should be.
    RuntimeFailure
        llama.cpp failed.
    """
    from edgemerge.runtime.evaluation.evaluate import mark
    from edgemerge.runtime.evaluation.likelihood import option_likelihoods
    from edgemerge.runtime.evaluation.tasks import read_task
    from edgemerge.runtime.llama import Model

    tasks = [
        read_task(name, folder / f"{name}.jsonl", limit=N_SHOWN, seed=SEED) for name in DOMAINS
    ]
    questions = [question for task in tasks for question in task.questions]
    columns: dict[str, list[Mark]] = {}
    for title, path in models.items():
        with Model(path) as model:
            found = option_likelihoods(model, questions)
        columns[title] = [mark(*pair) for pair in zip(questions, found, strict=True)]
    print(
        f"{len(questions)} of the held-out questions, {N_SHOWN} of each domain, drawn at random "
        f"(seed {SEED}).\nThe right answer stands after '='; {RIGHT} marks a model that gives it.\n"
    )
    print("\n".join(answer_lines(questions, columns)))
    print("\nTen questions are few: the table above has the figures of all.")


def answer_lines(questions: Sequence[Question], columns: Mapping[str, Sequence[Mark]]) -> list[str]:
    """Lay the answers out below their questions, 80 columns wide for four models.

    Parameters
    ----------
    questions : (n,) sequence of Question
        What was asked.
    columns : mapping of str -> (n,) sequence of Mark
        Title of a column -> what this model chose.
    """
    width = len(columns) * WIDTH
    lines = [*_row([f" {title}" for title in columns]), "-" * width]
    for i, question in enumerate(questions):
        lines += textwrap.wrap(f"{_subject(question)} = {question.options[question.answer]}", width)
        lines += _row([_answer(question, marks[i]) for marks in columns.values()])
    n_right = (sum(mark.right for mark in marks) for marks in columns.values())
    return [*lines, "-" * width, *_row([f" {n} of {len(questions)}" for n in n_right])]


def _subject(question: Question) -> str:
    """`insulin` of `Question: What class of substance is insulin?`."""
    asked = question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:").removesuffix("?")
    for before in ("Which group of diseases does ", "What class of substance is "):
        asked = asked.removeprefix(before)
    return asked.removesuffix(" belong to")


def _answer(question: Question, mark: Mark) -> str:
    return (RIGHT if mark.right else " ") + question.options[mark.chosen]


def _row(answers: Sequence[str]) -> list[str]:
    """Wrap answers into columns; the first character of each is its mark."""
    columns = []
    for answer in answers:
        first, *rest = textwrap.wrap(answer[1:], WIDTH - 4)
        columns.append([f"  {answer[0]}{first}", *(f"   {line}" for line in rest)])
    return [
        "".join(line.ljust(WIDTH) for line in lines).rstrip()
        for lines in zip_longest(*columns, fillvalue="")
    ]
