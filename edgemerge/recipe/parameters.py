"""What a recipe's parameters mean for one tensor: filters, gradients, levels (methods.md 2.16)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemerge.errors import RecipeError
from edgemerge.types import Gradient, Parameters, Rule, Setting

__all__ = ["check_settings", "look_up"]

SWITCHES = ("normalize", "int8_mask")
RESCALES = ("l1", "expectation")
CHOICES = {
    "weighting": ("agreement", "paper", "stock", "linear"),  # edgemerge.weighting
    "scope": ("tensor", "block", "row"),
}
SHARES = ("density", "gamma", "epsilon")
MAX_NUMBER = 3.4028234e38  # of float32, in which the arithmetic is done


def look_up(
    name: str, levels: Sequence[Parameters], tensor_names: Sequence[str], position: float
) -> Setting | None:
    """Find the value of a parameter for one tensor; None where no level says anything.

    Parameters
    ----------
    name : str
        The parameter.
    levels : sequence of Parameters
        From the most specific (one model in a slice) to the recipe as a whole; the first that has a
        rule for the tensor wins (mergekit config.py, `ConfigReader.parameter`).
    tensor_names : sequence of str
        The tensor's Hugging Face name, which mergekit's filters are written for, and its GGUF name.
    position : float
        Where the layer lies in its slice, 0 to 1; 0 for embeddings, final norm and head.
    """
    for parameters in levels:
        for rule in parameters.get(name, ()):
            if _matches(rule, tensor_names):
                value = rule.value
                return _interpolate(value, position) if isinstance(value, tuple) else value
    return None


def _matches(rule: Rule, tensor_names: Sequence[str]) -> bool:
    return rule.filter is None or any(rule.filter in name for name in tensor_names)


def _interpolate(gradient: Gradient, position: float) -> float:
    """Piecewise linear through equally spaced points."""
    scaled = position * (len(gradient) - 1)
    left = min(int(scaled), len(gradient) - 1)
    right = min(left + 1, len(gradient) - 1)
    share = scaled - left
    return gradient[left] * (1 - share) + gradient[right] * share


def check_settings(settings: Mapping[str, Setting | None]) -> dict[str, Setting]:
    """Refuse values that parameters cannot have, alone or together.

    Raises
    ------
    RecipeError
        Names the parameter, its value and what it may be.
    """
    checked = {key: _check_setting(key, value) for key, value in settings.items()}
    if "epsilon" in checked and not _is_valid_della(checked):
        raise RecipeError(
            f"density {checked['density']} plus or minus epsilon {checked['epsilon']} "
            "must stay inside (0, 1)",
            field="epsilon",
        )
    return checked


def _check_setting(key: str, value: Setting | None) -> Setting:
    if key in CHOICES:
        if value in CHOICES[key]:
            return str(value)
        wanted = f"one of {', '.join(CHOICES[key])}"
    elif key in SWITCHES or key == "rescale":
        if value in (0, 1):  # mergekit takes numbers for switches
            return bool(value)
        if key == "rescale" and value in RESCALES:
            return str(value)
        words = ("true", "false", *(RESCALES if key == "rescale" else ()))
        wanted = f"one of {', '.join(words)}"
    else:
        limit = 1.0 if key in SHARES else MAX_NUMBER
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        if is_number and (-limit if key not in SHARES else 0.0) <= float(value or 0) <= limit:
            return float(value or 0)
        wanted = "a number from 0 to 1" if key in SHARES else "a number"
    raise RecipeError(f"the parameter {key} is {value!r}; it must be {wanted}", field=key)


def _is_valid_della(settings: Mapping[str, Setting]) -> bool:
    density, epsilon = float(settings["density"]), float(settings["epsilon"])
    return not 0 < density < 1 or (density - epsilon > 0 and density + epsilon < 1)
