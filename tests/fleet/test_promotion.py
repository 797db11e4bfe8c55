"""The rule of promotion, by numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest

from edgemerge.fleet.promotion import Talk, Verdict, decide, find_fault
from edgemerge.fleet.site_file import Rule
from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.runtime.evaluation.paired import differ_in_marks, standard_errors
from edgemerge.runtime.evaluation.perplexity import Chunk
from edgemerge.runtime.smoke import Answer
from tests.support.updates import marks

FINE = Talk(Answer("m", "?", "Paris."), 10.0)


def judge(rule: Rule, old: Mapping[str, int], new: Mapping[str, int], n: int = 1000) -> Verdict:
    before, after = (
        Answers({name: marks(right, n) for name, right in one.items()}) for one in (old, new)
    )
    return decide(rule, before, after, FINE, FINE)


def test_a_gain_without_a_loss_is_promoted() -> None:
    found = judge(Rule(), {"a": 500, "b": 700}, {"a": 560, "b": 700})
    assert found.is_promoted
    assert found.reason.startswith(
        "a: 500 and 560 of 1000 right, +6.0 points (+4.5 to +7.5 at 95 %"
    )


def test_a_small_loss_is_allowed_where_the_interval_excludes_a_large_one() -> None:
    old, new = {"a": 500, "b": 700}, {"a": 560, "b": 695}
    assert judge(Rule(margin=2), old, new).is_promoted
    assert not judge(Rule(margin=0.5), old, new).is_promoted  # 0.5 are lost, perhaps 1
    assert judge(Rule(margin=0.5, margins={"b": 2}), old, new).is_promoted


def test_few_questions_cannot_show_that_nothing_is_lost() -> None:
    found = judge(Rule(margin=2, better=()), {"a": 15}, {"a": 15}, n=30)
    assert not found.is_promoted
    assert found.reason.endswith("so more than 2 may be lost")
    assert judge(Rule(margin=10, better=()), {"a": 15}, {"a": 15}, n=30).is_promoted


def test_each_task_that_is_named_must_be_better() -> None:
    old, new = {"a": 500, "b": 700}, {"a": 560, "b": 700}
    assert judge(Rule(better=("a",)), old, new).is_promoted
    assert judge(Rule(better=("a", "b")), old, new).reason == "b not better for certain"
    assert judge(Rule(better=()), old, old).is_promoted
    assert judge(Rule(), old, old).reason == "no task is better for certain"


def test_of_any_one_task_chance_counts_as_often_as_there_are_tasks() -> None:
    """Six questions more and none less have p 0.03: enough for one task, not for the best of two."""
    assert judge(Rule(margin=5), {"a": 500}, {"a": 506}).is_promoted
    assert not judge(Rule(margin=5), {"a": 500, "b": 500}, {"a": 506, "b": 500}).is_promoted
    assert judge(
        Rule(margin=5, better=("a",)), {"a": 500, "b": 500}, {"a": 506, "b": 500}
    ).is_promoted


def test_a_text_may_not_be_worse() -> None:
    def text(factor: float) -> Answers:
        return Answers({}, {"notes": [Chunk(factor * (600 + i), 0.0, 256) for i in range(40)]})

    rule = Rule(margin=2, better=())
    assert decide(rule, text(1.0), text(1.005), FINE, FINE).is_promoted  # 1.2 % of perplexity
    found = decide(rule, text(1.0), text(1.02), FINE, FINE)
    assert not found.is_promoted
    assert "so it may be more than 2 % worse" in found.reason


def test_few_chunks_cannot_show_that_a_text_is_kept() -> None:
    """Two chunks that lost 0.5 and 0.7 %: with one degree of freedom, t is 12.7 and not 1.96."""

    def text(n: int, *losses: float) -> Answers:
        return Answers({}, {"notes": [Chunk(256 * (2 + one), 0.0, 256) for one in losses * n]})

    rule = Rule(margin=1.5, better=())
    found = decide(rule, text(1, 0, 0), text(1, 0.005, 0.007), FINE, FINE)
    assert not found.is_promoted
    assert "+0.6 % (-0.7 to +1.9 at 95 %), so it may be more than 1.5 % worse" in found.reason
    assert decide(rule, text(10, 0, 0), text(10, 0.005, 0.007), FINE, FINE).is_promoted
    for one in (text(1, 0.005), text(1, 9, -9)):
        found = decide(rule, text(1, *[0.0] * len(one.chunks["notes"])), one, FINE, FINE)
        assert "(no interval from so few chunks at 95 %), so it may be more than" in found.reason
        json.dumps(found.as_json(), allow_nan=False)


def test_answers_to_the_smoke_question() -> None:
    assert find_fault(Answer("m", "?", "PARIS!"), "paris") is None
    assert find_fault(Answer("m", "?", "Rome"), "paris") is not None
    assert find_fault(Answer("m", "?", " "), None) == "it has no answer to the smoke question"
    assert find_fault(Answer("m", "?", "a a a", loops=True), None) is not None
    loops = Talk(Answer("m", "?", "a a a", loops=True), 10.0)
    same = Answers({"a": marks(50)})
    rule = Rule(better=(), margin=5)
    assert decide(rule, same, same, loops, loops).is_promoted  # the old one does too
    assert not decide(rule, same, same, FINE, loops).is_promoted
    crashed = Talk(Answer("m", "?", problem="llama.cpp crashed"), None)
    assert not decide(rule, same, same, crashed, crashed).is_promoted


def test_the_interval_is_agresti_and_min_s() -> None:
    """Worked by hand: 20 changes of 100 questions, 15 for the better."""
    old, new = marks(5, 100), marks(15, 100, first=5)
    found = differ_in_marks(old, new, standard_errors(0.95))
    mean = 10 / 102
    error = math.sqrt(((20 + 2) / 102 - mean**2) / 102)
    assert found.middle == pytest.approx(10.0)
    assert found.high - found.middle == pytest.approx(100 * 1.959964 * error, rel=1e-6)
    assert found.p == pytest.approx(2 * sum(math.comb(20, k) for k in range(6)) / 2**20)
