"""How sure a difference between two models is."""

from __future__ import annotations

import math

__all__ = ["Z_95", "difference_interval", "student_errors"]

Z_95 = 1.959964  # standard errors of a 95 % interval


def difference_interval(
    n: int, only_first: int, only_second: int, n_errors: float = Z_95
) -> tuple[float, float]:
    """Give the interval of the difference in accuracy of two models on the same questions.

    Each question counts +1, 0 or -1. An even split of none or few changes would have no error at all: one
    more change of each kind is added for it (Agresti and Min, 2005). No difference is beyond -1 or 1, so an
    end that would be is cut there.

    Parameters
    ----------
    n : int
        Questions, at least 1.
    only_first, only_second : int
        Those that one of the models has right and the other wrong.
    n_errors : float
        Standard errors from the middle to each end of the interval.

    Returns
    -------
    (float, float)
        Ends of the interval of the second's accuracy less the first's, as parts of 1.
    """
    total = n + 2
    mean = (only_second - only_first) / total
    error = math.sqrt(((only_first + only_second + 2) / total - mean**2) / total)
    middle = (only_second - only_first) / n
    return max(middle - n_errors * error, -1.0), min(middle + n_errors * error, 1.0)


def student_errors(confidence: float, n_free: int) -> float:
    """Return how many standard errors the interval of a mean reaches to each side, by Student's t.

    P(|t| < sqrt(n_free) * tan(angle)) is a finite sum of powers of the angle's cosine (Abramowitz and Stegun,
    26.7.3 and 26.7.4). Halving finds the angle.

    Parameters
    ----------
    confidence : float
        Of the interval, in (0, 1).
    n_free : int
        Degrees of freedom, at least 1: one less than values in the mean.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(53):
        middle = (low + high) / 2
        if _within(middle, n_free) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(n_free) * math.tan(low)


def _within(angle: float, n_free: int) -> float:
    cosine, is_odd = math.cos(angle), n_free % 2
    total, term = 0.0, cosine if is_odd else 1.0
    for power in range(is_odd, n_free - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
