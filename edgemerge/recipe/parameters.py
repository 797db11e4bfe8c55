"""What a recipe's parameters mean for one tensor: filters, gradients, levels as mergekit has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgemerge.types import Gradient, Parameters, Setting, Steps

__all__ = ["look_up"]


def look_up(
    name: str, levels: Sequence[Parameters], fits: Callable[[str], bool], position: float
) -> Setting | None:
    """Find the value of a parameter for one tensor; None where no level says anything.

    Parameters
    ----------
    name : str
        The parameter.
    levels : sequence of Parameters
        From the most specific (one model in a slice) to the recipe as a whole; the first that has a
        rule for the tensor wins (mergekit config.py, `ConfigReader.parameter`).
    fits : callable
        Tells whether a filter's text stands for the tensor.
    position : float
        Where the layer lies in its slice, 0 to 1; 0 for embeddings, final norm and head.
    """
    for parameters in levels:
        for rule in parameters.get(name, ()):
            if rule.filter is None or fits(rule.filter):
                value = rule.value
                return _along(value, position) if isinstance(value, tuple) else value
    return None


def _along(values: Gradient | Steps, position: float) -> Setting:
    """Take numbers as a gradient, and switches or words as steps of equal length."""
    if isinstance(values[0], bool | str):
        return values[int(position * (len(values) - 1))]
    return _interpolate(tuple(map(float, values)), position)


def _interpolate(gradient: Gradient, position: float) -> float:
    """Piecewise linear through equally spaced points."""
    scaled = position * (len(gradient) - 1)
    left = min(int(scaled), len(gradient) - 1)
    right = min(left + 1, len(gradient) - 1)
    weight = scaled - left
    return gradient[left] * (1 - weight) + gradient[right] * weight
