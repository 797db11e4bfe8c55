from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from edgemerge.runtime.evaluation.evaluate import Mark, compare, evaluate, mark, score
from edgemerge.runtime.evaluation.likelihood import Likelihoods
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.llama import Model

RIGHT, WRONG = Mark(0, 0, True, True), Mark(1, 1, False, False)


@pytest.mark.llama
def test_evaluate_is_repeatable(tiny_gguf: Path) -> None:
    questions = [
        Question("Question: what is the answer\nAnswer:", ("the first", "another one", "no"), 2),
        Question("Question: who\nAnswer:", ("a", "an answer that has many more letters"), 0),
    ]
    with Model(tiny_gguf, n_threads=1) as one, Model(tiny_gguf, n_threads=2) as two:
        first = evaluate(one, questions)
        assert evaluate(one, questions) == first
        assert evaluate(two, questions) == first


def test_score_is_the_harness_arithmetic() -> None:
    questions = [
        Question("", ("xx", "xxxxxxxxxx"), 0),
        Question("", ("xx", "xxxxxxxxxx"), 1),
        Question("", ("x", "y"), 1),
        Question("", ("x", "y"), 1),
        Question("", ("yy", "日本日"), 1),
    ]
    found = [
        Likelihoods((-2.0, -5.0), (1, 4)),  # acc right; by characters -1.0 < -0.5: wrong
        Likelihoods((-2.0, -5.0), (1, 4)),  # the other way round
        Likelihoods((-3.0, -1.0), (2, 1)),  # right both ways
        Likelihoods((-3.0, -3.0), (2, 2)),  # a tie goes to the first: wrong both ways
        Likelihoods((-2.0, -4.0), (1, 3)),  # characters count, not bytes: wrong both ways
    ]
    marks = [mark(*pair) for pair in zip(questions, found, strict=True)]
    assert [one.right for one in marks] == [True, False, True, False, False]
    assert [one.right_norm for one in marks] == [False, True, True, False, False]
    total = score(questions, found)
    assert (total.acc, total.acc_norm, total.n) == (0.4, 0.4, 5)
    assert total.loss == pytest.approx((2.0 + 5.0 + 1.0 + 3.0 + 4.0) / (1 + 4 + 1 + 2 + 3))
    # lm-evaluation-harness: sample standard deviation / sqrt(n)
    assert total.stderr == pytest.approx(np.std([1, 0, 1, 0, 0], ddof=1) / np.sqrt(5))
    assert math.isnan(score(questions[:1], found[:1]).stderr)


def test_mcnemar_is_the_exact_binomial() -> None:
    first = [RIGHT] * 10 + [WRONG] * 2 + [RIGHT] * 5
    second = [WRONG] * 10 + [RIGHT] * 2 + [RIGHT] * 5
    found = compare(first, second)
    assert (found.only_first, found.only_second) == (10, 2)
    assert found.difference == pytest.approx(-8 / 17)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)  # scipy.stats.binomtest(2, 12)
    assert compare(first, first).p == 1.0
    assert compare([RIGHT] * 3000, [WRONG] * 3000).p == pytest.approx(0.0, abs=1e-300)
    assert compare([RIGHT, WRONG], [WRONG, RIGHT]).p == 1.0  # the two tails overlap
