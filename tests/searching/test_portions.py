from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemerge.errors import FormatError
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.evaluation.tasks import Task
from edgemerge.searching.portions import LEAST, divide, divide_task


@given(st.integers(LEAST, 2000), st.floats(0.05, 0.9), st.text())
def test_every_question_has_one_place(n: int, held_out: float, seed: str) -> None:
    portions = divide(n, held_out, seed)
    parts = (*portions.rungs, portions.last)
    assert all(parts)
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert all(list(part) == sorted(part) for part in parts)
    assert portions == divide(n, held_out, seed)


def test_rungs_are_a_quarter_a_quarter_and_a_half() -> None:
    portions = divide(300, 1 / 3, "0 disease")
    assert [len(rung) for rung in portions.rungs] == [50, 50, 100]
    assert len(portions.last) == 100
    assert portions != divide(300, 1 / 3, "1 disease")


def task(n: int) -> Task:
    questions = tuple(Question(f"{i}?", ("a", "b"), 0) for i in range(n))
    return Task("t", Path("t.jsonl"), questions, tuple(range(5, 5 + n)), n, 0, None)


def test_a_task_keeps_the_places_of_its_questions() -> None:
    rungs, last = divide_task(task(12), 1 / 3, 0)
    assert [len(part.questions) for part in (*rungs, last)] == [2, 2, 4, 4]
    for part in (*rungs, last):
        assert [q.prompt for q in part.questions] == [f"{i - 5}?" for i in part.indices]


def test_too_few_questions_are_refused() -> None:
    with pytest.raises(FormatError, match=r"t.jsonl: has 11 questions, and a search needs 12"):
        divide_task(task(11), 1 / 3, 0)
    limited = replace(task(11), n_total=500)
    with pytest.raises(
        FormatError, match=r"has 500 questions, of which --limit takes 11, .* take more"
    ):
        divide_task(limited, 1 / 3, 0)
