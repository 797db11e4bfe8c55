"""How sure a difference between two models is."""

from __future__ import annotations

import math

__all__ = ["Z_95", "difference_interval"]

Z_95 = 1.959964  # standard errors of a 95 % interval


def difference_interval(
    n: int, only_first: int, only_second: int, n_errors: float = Z_95
) -> tuple[float, float]:
    """Give the interval of the difference in accuracy of two models on the same questions.

    Each question counts +1, 0 or -1. An even split of none or few changes would have no error at all: one
    more change of each kind is added for it (Agresti and Min, 2005).

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
    return middle - n_errors * error, middle + n_errors * error
