"""Questions of the benchmarks, from their files as published, asked as lm-evaluation-harness does.

`FILES` says which files; nothing is downloaded. The prompts are those of version 0.4.13's tasks
medqa_4options, medmcqa, pubmedqa and mmlu_SUBJECT; `questions` is asked as arc_easy is.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.files import refuse_device

__all__ = ["FILES", "FORMATS", "Question", "read_questions"]

FILES = """\
medqa      MedQA, US, 4 options (phrases_no_exclude_test.jsonl): lines with question, options
           {A, B, C, D} and answer_idx; or the Hub's rows (GBaker/MedQA-USMLE-4-options-hf) with
           sent1, ending0 to ending3 and label, counted from 0.
medmcqa    MedMCQA (dev.json; the answers to test.json are not public): lines with question, opa,
           opb, opc, opd and cop, which the authors count from 1 and the Hub from 0. A 4 or a 0
           somewhere in the file tells which; a file without either, or with both, is refused.
pubmedqa   PubMedQA (ori_pqal.json, or the test_set.json that the authors' script cuts from it): an
           object of entries by PMID with QUESTION, CONTEXTS and final_decision (yes, no, maybe); or
           such entries as lines, as on the Hub (bigbio/pubmed_qa). test_ground_truth.json, an
           object of decisions by PMID, stands for the official 500 questions of the test; their
           texts come from the ori_pqal.json beside it.
mmlu       MMLU, one subject (anatomy_test.csv): rows without a header of a question, four options
           and the letter of the right one. The file's name holds the subject.
questions  Lines with question, options (two or more) and answer, counted from 0.

Lines are JSON objects; other keys are ignored. All files are UTF-8.
"""
LETTERS = ("A", "B", "C", "D")
DECISIONS = ("yes", "no", "maybe")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, the options that may follow it after a space, and the index of the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int
    id: str | None = field(default=None, compare=False)  # that the file gives it

    @property
    def solved(self) -> str:
        """The prompt and its answer, as a worked example."""
        return f"{self.prompt} {self.options[self.answer]}\n\n"


def read_questions(path: str | PathLike[str], format_name: str = "questions") -> list[Question]:
    """Read a file of questions.

    Parameters
    ----------
    path : str or path
        The file.
    format_name : str
        A key of `FORMATS`; `FILES` describes them.

    Raises
    ------
    FormatError
        A record is not as it should be; the message names it. Or the file has no questions.
    """
    path = Path(path)
    refuse_device(path)
    try:
        questions = FORMATS[format_name](path)
        for question in questions:  # JSON can spell half a surrogate pair, "\\ud800"
            "".join((question.prompt, *question.options)).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise FormatError(f"not UTF-8 text ({error.reason})", path=path) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(
            "not JSON: it has a number or a nesting without end", path=path
        ) from error
    if not questions:
        raise FormatError("there are no questions in it", path=path)
    return questions


# -- MedQA -----------------------------------------------------------------------------------------


def _read_medqa(path: Path) -> list[Question]:
    return [_medqa(item) for item in _items(path)]


def _medqa(item: _Item) -> Question:
    if "sent1" in item.values:
        question = item.text("sent1")
        options = [item.text(f"ending{i}") for i in range(4)]
        answer = item.index("label", 4)
    else:
        question = item.text("question")
        choices = item.values.get("options")
        if not isinstance(choices, dict) or sorted(choices) != list(LETTERS):
            raise item.wrong("'options' must be an object with the texts A, B, C and D")
        options = [_Item(item.where, item.path, choices).text(letter) for letter in LETTERS]
        answer = item.choice("answer_idx", LETTERS)
    return Question(f"Question: {question}\n{_lettered(options)}Answer:", LETTERS, answer, item.id)


def _lettered(options: Sequence[str]) -> str:
    return "".join(f"{k}. {option}\n" for k, option in zip(LETTERS, options, strict=True))


# -- MedMCQA ---------------------------------------------------------------------------------------


def _read_medmcqa(path: Path) -> list[Question]:
    items = list(_items(path))
    answers = [item.number("cop") for item in items]
    if all(answer == -1 for answer in answers):
        raise FormatError(
            "its answers are not public (cop is -1): use the validation file", path=path
        )
    first = _first_index(path, answers)
    for item, answer in zip(items, answers, strict=True):
        if not first <= answer < first + 4:
            raise item.wrong(f"'cop' must be {first} to {first + 3}, as in the rest of the file")
    return [_medmcqa(item, cop - first) for item, cop in zip(items, answers, strict=True)]


def _first_index(path: Path, answers: Sequence[int]) -> int:
    """Whether `cop` counts from 1, as the authors do, or from 0, as the Hub does."""
    if 4 in answers and 0 not in answers:
        return 1
    if 0 in answers and 4 not in answers:
        return 0
    found = "both 0 and 4" if 0 in answers else "neither 0 nor 4"
    raise FormatError(
        f"it has {found} as 'cop', so whether that counts from 0 or from 1 cannot be told: "
        "use the published file, whole",
        path=path,
    )


def _medmcqa(item: _Item, answer: int) -> Question:
    question = item.text("question")
    options = _lettered([item.text(f"op{letter}") for letter in "abcd"])
    return Question(f"Question: {question}\nChoices:\n{options}Answer:", LETTERS, answer, item.id)


# -- PubMedQA --------------------------------------------------------------------------------------


def _read_pubmedqa(path: Path) -> list[Question]:
    entries = _read_object(path)
    if entries is None:
        return [_pubmedqa(item) for item in _items(path)]
    if not any(isinstance(entry, str) for entry in entries.values()):
        return [_pubmedqa(_entry(path, pmid, entry)) for pmid, entry in entries.items()]
    beside = path.with_name("ori_pqal.json")
    if not beside.is_file():
        raise FormatError(
            "it holds answers alone: put PubMedQA's ori_pqal.json beside it", path=path
        )
    texts = _read_object(beside) or {}
    questions = []
    for pmid, decision in entries.items():
        if pmid not in texts:
            raise FormatError(f"PMID {pmid} is not in the ori_pqal.json beside it", path=path)
        entry = _entry(path, pmid, texts[pmid])
        questions.append(
            _pubmedqa(_entry(path, pmid, {**entry.values, "final_decision": decision}))
        )
    return questions


def _read_object(path: Path) -> dict[str, Any] | None:
    """One JSON object that fills the file; None where it holds lines of them."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second object after the first
            return None
        raise FormatError(f"line {error.lineno}: not JSON ({error.msg})", path=path) from error
    is_row = isinstance(document, dict) and "QUESTION" in document  # a file of a single line
    return document if isinstance(document, dict) and not is_row else None


def _entry(path: Path, pmid: str, entry: object) -> _Item:
    if not isinstance(entry, dict):
        raise FormatError(f"PMID {pmid}: expected an object with QUESTION and CONTEXTS", path=path)
    return _Item(f"PMID {pmid}", path, {"id": pmid, **entry})


def _pubmedqa(item: _Item) -> Question:
    question = item.text("QUESTION")
    contexts = item.values.get("CONTEXTS")
    if not isinstance(contexts, list) or not all(isinstance(text, str) for text in contexts):
        raise item.wrong("'CONTEXTS' must be a list of texts")
    prompt = "Abstract: {}\nQuestion: {}\nAnswer:".format("\n".join(contexts), question)
    return Question(prompt, DECISIONS, item.choice("final_decision", DECISIONS), item.id)


# -- MMLU ------------------------------------------------------------------------------------------


def _read_mmlu(path: Path) -> list[Question]:
    questions = []
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a mark before
        rows = csv.reader(file)  # with its defaults, as the Hub's cais/mmlu was made
        try:
            for row in rows:
                questions.append(_mmlu(row, path, rows.line_num))
        except csv.Error as error:
            raise FormatError(f"line {rows.line_num}: not CSV ({error})", path=path) from error
    return questions


def _mmlu(row: Sequence[str], path: Path, number: int) -> Question:
    if len(row) != 6 or row[5] not in LETTERS:
        raise FormatError(
            f"line {number}: expected a question, four options and a letter A to D", path=path
        )
    question, *options, letter = row
    prompt = f"{question.strip()}\n{_lettered(options)}Answer:"
    return Question(prompt, LETTERS, LETTERS.index(letter))


# -- our own ---------------------------------------------------------------------------------------


def _read_own(path: Path) -> list[Question]:
    return [_own(item) for item in _items(path)]


def _own(item: _Item) -> Question:
    question = item.text("question")
    options = item.values.get("options")
    if not isinstance(options, list) or len(options) < 2:
        raise item.wrong("'options' must be a list of two or more texts")
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise item.wrong("'options' must be texts that are not empty")
    answer = item.index("answer", len(options))
    return Question(f"Question: {question}\nAnswer:", tuple(options), answer, item.id)


# -- JSON ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Item:
    """One record of a file, and where it stands."""

    where: str
    path: Path
    values: Mapping[str, Any]

    @property
    def id(self) -> str | None:
        """The record's own name, where it has one."""
        value = self.values.get("id")
        return str(value) if isinstance(value, str | int) else None

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.where}: {what}", path=self.path)

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.wrong(f"{key!r} must be a text")
        return value

    def number(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int:  # a bool is an int too
            raise self.wrong(f"{key!r} must be a whole number")
        return value

    def index(self, key: str, n_options: int) -> int:
        value = self.values.get(key)
        if type(value) is not int or not 0 <= value < n_options:
            raise self.wrong(f"{key!r} must be the index of an option, 0 to {n_options - 1}")
        return value

    def choice(self, key: str, among: Sequence[str]) -> int:
        value = self.values.get(key)
        if value not in among:
            raise self.wrong(f"{key!r} must be one of {', '.join(among)}")
        return among.index(value)


def _items(path: Path) -> Iterator[_Item]:
    """Read the records of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                what = f"not JSON ({error.msg} at column {error.colno})"
                raise FormatError(f"{where}: {what}", path=path) from error
            if not isinstance(values, dict):
                raise FormatError(f"{where}: expected an object", path=path)
            yield _Item(where, path, values)


FORMATS: dict[str, Callable[[Path], list[Question]]] = {
    "medqa": _read_medqa,
    "medmcqa": _read_medmcqa,
    "pubmedqa": _read_pubmedqa,
    "mmlu": _read_mmlu,
    "questions": _read_own,
}
