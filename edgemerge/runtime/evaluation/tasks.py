"""A benchmark ready to be asked: description, worked examples and a sample of its questions.

Worked examples (shots) are the first of a file. That is lm-evaluation-harness's rule for MMLU; its
other tasks draw them at random, another set for each question, unless `fewshot_config` says
`sampler: first_n`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.runtime.evaluation.questions import FORMATS, Question, read_questions

__all__ = ["Task", "read_task"]

_DESCRIPTION = "The following are multiple choice questions (with answers) about {}.\n\n"
_SPLITS = ("_test", "_dev", "_val")


@dataclass(frozen=True, slots=True)
class Task:
    """Questions of one file, ready to be asked.

    Attributes
    ----------
    name : str
        Of the benchmark; `mmlu_SUBJECT` for MMLU, the file's for `questions`.
    path : Path
        The file.
    questions : tuple of Question
        With the description and the worked examples in their prompts.
    indices : tuple of int
        The place of each in the file, from 0.
    n_total : int
        Questions in the file.
    n_shots : int
        Worked examples in each prompt.
    examples : Path or None
        The file that they are from.
    """

    name: str
    path: Path
    questions: tuple[Question, ...]
    indices: tuple[int, ...]
    n_total: int
    n_shots: int
    examples: Path | None


def read_task(
    name: str,
    path: str | PathLike[str],
    *,
    shots: int = 0,
    examples: str | PathLike[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Task:
    """Read a benchmark's file and make its prompts.

    Parameters
    ----------
    name : str
        A key of `FORMATS`, or a name of one's own for a file of `questions`.
    path : str or path
        The file.
    shots : int
        Worked examples in front of each question: the first of `examples`.
    examples : str or path, optional
        Another file of the same format.
    limit : int, optional
        Take this many questions, drawn at random and asked in the file's order.
    seed : int
        Of the draw: the same seed, limit and file give the same questions.

    Raises
    ------
    FormatError
        A file is not of the format, or the examples are fewer than `shots` or of another subject.
    """
    path = Path(path)
    format_name = name if name in FORMATS else "questions"
    preamble = _preamble(format_name, path, shots, examples)
    questions = read_questions(path, format_name)
    indices: Sequence[int] = range(len(questions))
    if limit is not None and limit < len(questions):
        indices = sorted(random.Random(seed).sample(indices, limit))
    return Task(
        name=_full_name(name, path),
        path=path,
        questions=tuple(
            replace(questions[i], prompt=preamble + questions[i].prompt) for i in indices
        ),
        indices=tuple(indices),
        n_total=len(questions),
        n_shots=shots,
        examples=None if examples is None else Path(examples),
    )


def _full_name(name: str, path: Path) -> str:
    """Name the subject too, or where nothing but the file is named, call the task as that."""
    if name == "mmlu":
        return f"mmlu_{_subject(path)}"
    return path.stem if name == "questions" else name


def _preamble(
    format_name: str, path: Path, shots: int, examples: str | PathLike[str] | None
) -> str:
    """Text before the question: MMLU's description, and worked examples."""
    text = ""
    if format_name == "mmlu":
        subject = _subject(path)
        text = _DESCRIPTION.format(subject.replace("_", " "))
        if examples is not None and _subject(Path(examples)) != subject:
            raise FormatError(f"its examples are not about {subject}", path=examples)
    if examples is None:
        return text
    worked = read_questions(examples, format_name)
    if shots > len(worked):
        raise FormatError(f"it has {len(worked)} examples, not {shots}", path=examples)
    return text + "".join(example.solved for example in worked[:shots])


def _subject(path: Path) -> str:
    """`college_medicine`, of college_medicine_test.csv."""
    for split in _SPLITS:
        if path.stem.endswith(split) and path.stem != split:
            return path.stem.removesuffix(split)
    raise FormatError("an MMLU file is named SUBJECT_test.csv, as anatomy_test.csv", path=path)
