from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.runtime.evaluation.evaluate import Mark, compare
from edgemerge.runtime.evaluation.paired import without_infinity
from edgemerge.runtime.evaluation.perplexity import Chunk
from edgemerge.searching.objective import Objective
from edgemerge.searching.verdict import judge, mean_verdict
from edgemerge.searching.words import held_out_rows, held_out_sentences


def marks(text: str) -> list[Mark]:
    return [Mark(0, 0, letter == "+", False) for letter in text]


def test_a_task_is_compared_question_by_question() -> None:
    first, second = marks("++++------" * 10), marks("+++-+++---" * 10)
    (one,) = judge(Answers({"t": first}), Answers({"t": second}), Objective({"t": 1}, {"t": 2}))
    assert (one.name, one.n, one.start, one.best) == ("t", 100, 40, 60)
    assert one.difference == pytest.approx(20)
    # 30 won and 10 lost, with one more of each in 102: mean 20/102, mean square 42/102
    error = 100 * math.sqrt((42 / 102 - (20 / 102) ** 2) / 102)
    assert one.high - one.low == pytest.approx(2 * 1.959964 * error)
    assert one.p == compare(first, second).p
    assert one.is_kept is True


def test_equal_answers_show_little_where_questions_are_few() -> None:
    few, many = marks("+-" * 10), marks("+-" * 500)
    objective = Objective({"t": 1}, {"t": 2})
    (one,) = judge(Answers({"t": few}), Answers({"t": few}), objective)
    assert (one.difference, one.p, one.is_kept) == (0, 1, False)
    (one,) = judge(Answers({"t": many}), Answers({"t": many}), objective)
    assert one.is_kept is True


def test_the_mean_is_of_the_tasks_that_count() -> None:
    start = Answers({"a": marks("+---"), "b": marks("++--"), "c": marks("++++")})
    best = Answers({"a": marks("++--"), "b": marks("++--"), "c": marks("----")})
    verdicts = judge(start, best, Objective({}, {}))
    mean = mean_verdict(verdicts, {"a": 1, "b": 3, "c": 0})
    assert mean is not None
    assert (mean.name, mean.n) == ("mean of 2 tasks", 8)
    assert (mean.start, mean.best) == (25 / 4 + 50 * 3 / 4, 50)
    assert mean.low < 0 < mean.high
    assert mean_verdict(verdicts, {"text": 1}) is None


def test_a_mean_counts_the_errors_of_intervals_that_are_cut() -> None:
    """Of 10 questions all were won: the interval's upper end is cut at 100 points, its error is not."""
    start, best = ({name: marks(sign * 10) for name in "ab"} for sign in "-+")
    verdicts = judge(Answers(start), Answers(best), Objective({}, {}))
    mean = mean_verdict(verdicts, {"a": 1, "b": 1})
    assert mean is not None
    assert [one.high for one in (*verdicts, mean)] == [100, 100, 100]
    half = 100 - verdicts[0].low
    assert half == pytest.approx(31.3, abs=0.05)
    assert 100 - mean.low == pytest.approx(half / math.sqrt(2))


def test_a_text_is_compared_chunk_by_chunk() -> None:
    start = Answers({}, {"text": [Chunk(200, 500, 100), Chunk(300, 1000, 100)]})
    best = Answers({}, {"text": [Chunk(210, 500, 100), Chunk(310, 1000, 100)]})
    (one,) = judge(start, best, Objective({"text": 1}, {"text": 5}))
    assert one.start == pytest.approx(math.exp(2.5))
    assert one.difference == pytest.approx(100 * math.expm1(0.1))
    assert one.low == pytest.approx(one.high)  # every chunk lost as much
    assert (one.is_text, one.n, one.is_kept) == (True, 200, False)


def test_one_chunk_shows_nothing() -> None:
    start, best = ({"text": [Chunk(nll, 500, 100)]} for nll in (200, 201))
    (one,) = judge(Answers({}, start), Answers({}, best), Objective({"text": 1}, {"text": 5}))
    assert one.difference == pytest.approx(100 * math.expm1(0.01))
    assert one.is_kept is False
    row = without_infinity(asdict(one))
    found = json.loads(json.dumps({"verdicts": [row], "mean": None, "earlier": 0}, allow_nan=False))
    ((*_, difference, _),) = held_out_rows({"held_out": found})
    assert difference == "+1.0 % (no interval)"
    (said,) = held_out_sentences({"held_out": found})
    assert (
        said == "text may lose more than 5 percent: the chunks held out of it are too few to tell"
    )
