"""The tables of quality: a file is scored once, and every row is compared with the reference."""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemerge.methods.table import METHODS
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.evaluation.tasks import Task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def asked(n: int) -> Any:
    scores = module("quality_scores")
    questions = tuple(Question(f"Question: {i}?\nAnswer:", ("a", "b"), 0) for i in range(n))
    task = Task("any", Path("any.jsonl"), questions, tuple(range(n)), n, 0, None)
    return scores.Asked({name: task for name in scores.SETS}, ("Hello?",))


def sheet(chosen: str) -> dict[str, Any]:
    right = chosen.count("0") / len(chosen)
    one = {"score": {"acc": right, "stderr": 0.01}, "chosen": chosen, "chosen_norm": chosen}
    names = module("quality_scores").SETS
    return {
        "sets": dict.fromkeys(names, one),
        "perplexity": [20.0, 0.5],
        "answers": ["one\n| two"],
        "cpu_s": 1.25,
        "peak_mib": 99.6,
    }


def test_a_row_is_paired_with_the_reference() -> None:
    rows, tables = module("quality_rows"), module("quality_table")
    reference = next(row for row in rows.OURS if row.label == rows.REFERENCE)
    other = replace(reference, label="other")
    both = [(other, sheet("00000000")), (reference, sheet("00001111"))]
    _, _, first, second = tables.render(both, asked(8)).splitlines()
    # four of four more in each of two sets: p = 2 / 2**8; in one set 2 / 2**4
    half = "100.0 ± 2.0 | 100.0 ± 2.0 | 100.0 ± 2.0 | +50.0, p 0.008 | +50.0, p 0.125"
    assert first == f"| other | {half} | 20.00 ± 0.98 | 100 % | 1.2 | 100 | {reference.settings} |"
    assert second.split(" | ")[4:6] == ["", ""]
    assert tables.answers(both, asked(8)).count("| other | one \\| two |") == 1
    part = tables.render([(other, {}), both[1]], asked(8)).splitlines()
    assert part[2].startswith("| other | not scored yet |")
    assert len({line.count(" | ") for line in part}) == 1


def test_every_row_is_a_merge_that_the_program_knows() -> None:
    rows = module("quality_rows")
    found = [*rows.merges(), *rows.VARIANTS, *rows.shuffled()]
    assert {row.method for row in found} <= METHODS.keys()
    names = [(row.group, row.label) for row in found]
    assert len(set(names)) == len(names)
    linear = next(row for row in found if row.group == "paper" and row.method == "linear")
    words = rows.words_of(linear, "base", ["a", "b"])
    assert words == ["-m", "linear", "a", "b", "--preset", "paper"]
    slerp = next(row for row in found if row.method == "slerp")
    assert rows.words_of(slerp, "base", ["a", "b"]) == [
        "-m",
        "slerp",
        "b",
        "--base",
        "a",
        "-P",
        "t=0.5",
    ]


@pytest.mark.llama
def test_what_was_asked_before_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    scores = module("quality_scores")
    scored: list[tuple[str, str]] = []

    def ask(question: str, weights: str) -> str:
        scored.append((weights, question))
        return question

    class Fake:
        def __init__(self, *questions: str) -> None:
            self.questions = questions

        def parts(self) -> dict[str, Any]:
            return {q: scores.Part(q, functools.partial(ask, q)) for q in self.questions}

    monkeypatch.setattr(scores, "Model", lambda path: contextlib.nullcontext(path.read_text()))
    monkeypatch.setattr(scores, "digest", lambda path: path.read_text())
    model, kept = tmp_path / "model.gguf", tmp_path / "cache" / "scores.json"
    for weights, questions in (("one", "ab"), ("two", "ab"), ("one", "ba"), ("one", "bc")):
        model.write_text(weights)
        found = scores.Scores(kept, Fake(*questions)).of(model)
        assert found == dict(zip(questions, questions, strict=True))
    assert scored == [("one", "a"), ("one", "b"), ("two", "a"), ("two", "b"), ("one", "c")]
    assert [path.name for path in kept.parent.iterdir()] == ["scores.json"]
    assert scores.Scores(kept, Fake("d")).of(model, only_kept=True) is None


def test_who_repeats_himself_has_few_distinct_words() -> None:
    distinct_words = module("quality_scores").distinct_words
    assert distinct_words(["one two three Four", "four four four four"]) == (1 + 1 / 4) / 2
    assert distinct_words(["", "so so"]) == 1 / 4
