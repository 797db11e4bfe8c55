"""The parameters that merge methods have: names and defaults of mergekit, what they may be, what they do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from edgemerge.errors import RecipeError
from edgemerge.types import Setting

__all__ = [
    "DENSITY",
    "EPSILON",
    "GAMMA",
    "INT8_MASK",
    "LAMBDA",
    "NORMALIZE",
    "RAMP",
    "RANK",
    "RESCALE",
    "SAME_BELOW",
    "SCALE",
    "WEIGHT",
    "Kind",
    "Parameter",
]

MAX_NUMBER = 3.4028234e38  # of float32, in which the arithmetic is done

Kind = Literal["number", "fraction", "count", "switch", "word"]

RANGES: dict[str, tuple[float, float]] = {  # kind -> least and largest number
    "number": (-MAX_NUMBER, MAX_NUMBER),
    "fraction": (0.0, 1.0),
    "count": (0.0, float(1 << 31)),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes
    ----------
    name : str
        As recipes spell it.
    help : str
        What it does, in a few words.
    default : Setting, optional
        None: it must be given.
    kind : str
        `number`; `fraction`, a number from 0 to 1; `count`, a whole number; `switch`, true or false;
        `word`, one of `words`.
    words : tuple of str
        Words that are allowed; a switch may have some too.
    of_model : bool
        Whether each model has its own value. Otherwise the merge has one.
    needs : str
        Name of the switch without which it has no effect; empty: there is none.
    span : (float, float), optional
        Usual least and largest value, which a slider shows; other values are allowed. None: all that is
        allowed of a fraction, and no slider for any other kind.
    """

    name: str
    help: str
    default: Setting | None = None
    kind: Kind = "number"
    words: tuple[str, ...] = ()
    of_model: bool = False
    needs: str = ""
    span: tuple[float, float] | None = None

    def by_default(self, value: Setting) -> Parameter:
        """Return the same parameter with another default."""
        return replace(self, default=value)

    def allowed(self) -> str:
        """Say which values are allowed, as an error message does."""
        if self.kind == "number":
            return "a number"
        if self.kind == "fraction":
            return "a number from 0 to 1"
        if self.kind == "count":
            return "a whole number from 0"
        switch = ("true", "false") if self.kind == "switch" else ()
        return f"one of {', '.join((*switch, *self.words))}"

    def check(self, value: Setting | None, owner: str = "") -> Setting:
        """Return a value as the type that the method expects.

        Parameters
        ----------
        value : Setting or None
            What a recipe says.
        owner : str
            The model that it is for; empty where it is for all.

        Raises
        ------
        RecipeError
            The value is not allowed.
        """
        if isinstance(value, str) and value in self.words:
            return value
        if self.kind == "switch" and value in (0, 1):  # mergekit takes numbers for switches
            return bool(value)
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        if self.kind in RANGES and is_number:
            number = float(value or 0)
            least, most = RANGES[self.kind]
            if least <= number <= most and (self.kind != "count" or number.is_integer()):
                return number
        raise RecipeError(
            f"the parameter {self.name}{f' of {owner}' if owner else ''} is {value!r}; it must be "
            f"{self.allowed()}",
            field=self.name,
        )


WEIGHT = Parameter("weight", "factor of a model", of_model=True, span=(0.0, 2.0))
DENSITY = Parameter("density", "fraction of entries to keep", 1.0, "fraction", of_model=True)
GAMMA = Parameter(
    "gamma", "fraction of entries to drop as the largest", 0.01, "fraction", of_model=True
)
EPSILON = Parameter(
    "epsilon", "half the span of the probabilities to keep", 0.15, "fraction", of_model=True
)
SAME_BELOW = Parameter(  # a name that DELLA gives another meaning
    "epsilon", "change of an element up to which a model counts as not having changed it", 1e-5
)
SCALE = Parameter("scale", "factor of the tensor", 1.0, of_model=True, span=(0.0, 2.0))
NORMALIZE = Parameter("normalize", "divide by the sum of the weights", False, "switch")
RESCALE = Parameter(
    "rescale",
    "enlarge what is kept: `true` or `l1` to the L1 norm from before, `expectation` by the "
    "probability to be kept",
    False,
    "switch",
    ("l1", "expectation"),
)
LAMBDA = Parameter("lambda", "factor of the merged change", 1.0, span=(0.0, 2.0))
RAMP = (0.6, 1.2)  # lambda of the first and the last layer in the preset `ramp`
RANK = Parameter(
    "rank", "first singular directions of a matrix that are changed", 8.0, "count", span=(1.0, 64.0)
)
INT8_MASK = Parameter("int8_mask", "accepted, and without effect", False, "switch")
