"""Two models on the same questions or the same text: by how much they differ, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from edgemerge.errors import MismatchError
from edgemerge.runtime.evaluation.evaluate import Mark, compare
from edgemerge.runtime.evaluation.intervals import Z_95, difference_interval, student_errors
from edgemerge.runtime.evaluation.perplexity import Chunk

__all__ = ["Difference", "differ_in_marks", "differ_in_perplexity", "standard_errors"]
__all__ += ["without_infinity"]

WIDEST = math.log(1e4)  # an interval that reaches farther up and down says nothing of a perplexity


@dataclass(frozen=True, slots=True)
class Difference:
    """What the second model has more than the first.

    Attributes
    ----------
    middle, low, high : float
        Percentage points of right answers, or percent of perplexity; and their interval. Of too few chunks it
        is from minus infinity to infinity.
    p : float or None
        McNemar's, of right answers.
    """

    middle: float
    low: float
    high: float
    p: float | None = None


def without_infinity(figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures as JSON has them: None is an end of an interval that is not known."""
    return {
        key: None if isinstance(value, float) and math.isinf(value) else value
        for key, value in figures.items()
    }


def standard_errors(confidence: float) -> float:
    """Return how many standard errors an interval reaches to each side: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def differ_in_marks(
    first: Sequence[Mark], second: Sequence[Mark], n_errors: float = Z_95
) -> Difference:
    """Compare right answers to the same questions.

    Parameters
    ----------
    first, second : (n,) sequence of Mark
        At least one.
    n_errors : float
        Standard errors from the middle to each end of the interval.
    """
    found = compare(first, second)
    low, high = difference_interval(len(first), found.only_first, found.only_second, n_errors)
    return Difference(100 * found.difference, 100 * low, 100 * high, found.p)


def differ_in_perplexity(
    first: Sequence[Chunk], second: Sequence[Chunk], confidence: float = 0.95
) -> Difference:
    """Compare perplexities by the log-likelihoods of the same chunks.

    Few chunks show their spread badly: the interval is Student's. One chunk shows none.

    Parameters
    ----------
    first, second : (n,) sequence of Chunk
        At least one.
    confidence : float
        Of the interval, in (0, 1).

    Raises
    ------
    MismatchError
        They are not the same chunks.
    """
    if [one.n for one in first] != [one.n for one in second]:
        raise MismatchError(
            f"the models cut a text into {len(first)} and {len(second)} chunks of other tokens, so their "
            "perplexities cannot be compared; give models of one tokenizer, or leave out the text"
        )
    differences = [b.nll / b.n - a.nll / a.n for a, b in zip(first, second, strict=True)]
    n = len(differences)
    middle = sum(differences) / n
    half = math.inf
    if n > 1:
        spread = math.sqrt(sum((one - middle) ** 2 for one in differences) / (n - 1))
        half = student_errors(confidence, n - 1) * spread / math.sqrt(n)
    if half > WIDEST:
        return Difference(100 * math.expm1(middle), -math.inf, math.inf)
    return Difference(
        *(100 * math.expm1(value) for value in (middle, middle - half, middle + half))
    )
