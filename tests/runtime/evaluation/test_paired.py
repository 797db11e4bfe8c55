from __future__ import annotations

import numpy as np
import pytest

from edgemerge.errors import MismatchError
from edgemerge.runtime.evaluation.evaluate import Mark
from edgemerge.runtime.evaluation.intervals import difference_interval, student_errors
from edgemerge.runtime.evaluation.paired import differ_in_marks, differ_in_perplexity
from edgemerge.runtime.evaluation.perplexity import Chunk


def test_no_difference_is_beyond_all_questions() -> None:
    right, wrong = [Mark(0, 0, True, True)] * 10, [Mark(1, 1, False, False)] * 10
    found = differ_in_marks(wrong, right)
    assert (found.middle, found.high) == (100, 100)
    assert found.low == pytest.approx(68.7, abs=0.05)
    for n_errors in (1, 2, 5):
        low, high = difference_interval(1, 1, 0, n_errors)
        assert -1 == low < high <= 1


@pytest.mark.parametrize(
    ("n_free", "at_90", "at_95", "at_999"),
    [
        (1, 6.314, 12.706, 636.619),
        (2, 2.920, 4.303, 31.599),
        (3, 2.353, 3.182, 12.924),
        (4, 2.132, 2.776, 8.610),
        (29, 1.699, 2.045, 3.659),
        (120, 1.658, 1.980, 3.373),
    ],
)
def test_students_t_is_that_of_the_tables(
    n_free: int, at_90: float, at_95: float, at_999: float
) -> None:
    found = [student_errors(confidence, n_free) for confidence in (0.9, 0.95, 0.999)]
    assert found == pytest.approx([at_90, at_95, at_999], abs=5e-4)


def test_of_many_it_is_the_normal_distributions() -> None:
    assert student_errors(0.95, 100_000) == pytest.approx(1.96, abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 4, 12])
def test_the_interval_of_few_chunks_has_what_is_true_as_often_as_it_says(n: int) -> None:
    lost = np.random.default_rng(n).normal(0.0, 0.01, (2000, n))
    found = [
        differ_in_perplexity([Chunk(2.0, 0, 1)] * n, [Chunk(2.0 + one, 0, 1) for one in row])
        for row in lost.tolist()
    ]
    assert np.mean([one.low < 0 < one.high for one in found]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("other", [[Chunk(2.0, 0, 255)] * 3, [Chunk(2.0, 0, 127)] * 4])
def test_other_chunks_are_not_compared(other: list[Chunk]) -> None:
    """Fault: unlike numbers of chunks, as two tokenizers make them, gave a ValueError."""
    with pytest.raises(MismatchError, match="perplexities cannot be compared"):
        differ_in_perplexity([Chunk(2.0, 0, 255)] * 4, other)
