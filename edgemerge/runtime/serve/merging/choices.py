"""What a merge on the page may be: the methods with their numbers, the types, and a request's check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, StrictBool

from edgemerge.errors import RecipeError
from edgemerge.formats.quants.filetypes import FILE_TYPES
from edgemerge.methods.method import Method
from edgemerge.methods.parameters import INT8_MASK, RANGES, Parameter
from edgemerge.methods.table import METHODS, find_method
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.merging.offers import Offer, Offers
from edgemerge.runtime.serve.requests import Body

__all__ = ["MergeRequest", "PlanRequest", "Wanted", "describe_methods", "read_request"]

TYPES = ("keep", *FILE_TYPES)
_MAX_MODELS = 16
_HIDDEN = (INT8_MASK.name,)  # what has no effect

Settings = dict[str, StrictBool | float | str]


class Taken(Body):
    """A model or delta, and what is set for it."""

    file: str
    parameters: Settings = Field(default_factory=dict)


class PlanRequest(Body):
    """A merge: files by the keys of `Offers`."""

    method: str
    base: str | None = None
    models: Annotated[list[Taken], Field(min_length=1, max_length=_MAX_MODELS)]
    parameters: Settings = Field(default_factory=dict)
    type: str = "keep"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class MergeRequest(PlanRequest):
    """A merge and the name of its result."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,47}$")]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A merge that was checked.

    Attributes
    ----------
    method : Method
        How.
    base : Offer or None
        The model that the others were tuned from.
    models : tuple of (Offer, dict)
        The others, each with its parameters.
    parameters : dict
        Of the merge.
    type : str
        Of the output.
    seed : int
        Of random methods.
    """

    method: Method
    base: Offer | None
    models: tuple[tuple[Offer, dict[str, Any]], ...]
    parameters: dict[str, Any]
    type: str
    seed: int

    def recipe(self) -> dict[str, Any]:
        """Write the recipe, in mergekit's words."""
        document: dict[str, Any] = {"merge_method": self.method.name}
        if self.base is not None:
            document["base_model"] = _reference(self.base)
        document["models"] = [
            {"model": _reference(offer), "parameters": own} for offer, own in self.models
        ]
        return document | {"parameters": self.parameters}

    def options(self) -> list[str]:
        """Give what the recipe does not say, as options of `merge` and `plan`."""
        return ["--type", self.type, "--seed", str(self.seed)]

    def settings(self) -> dict[str, Any]:
        """Tell the numbers, for a record."""
        return {
            "type": self.type,
            "seed": self.seed,
            "parameters": self.parameters,
            "models": [{"name": offer.name, **own} for offer, own in self.models],
        }


def _reference(offer: Offer) -> dict[str, Any]:
    """Name a file so that no letter of its path has a meaning of its own."""
    return {"model": {"path": str(offer.path)}}


def describe_methods() -> dict[str, Any]:
    """Tell the methods with their parameters, and the types of an output."""
    return {"methods": [_describe(method) for method in METHODS.values()], "types": TYPES}


def _describe(method: Method) -> dict[str, Any]:
    least, most = method.n_models
    uses_base = method.needs_base or method.takes_base or method.merges_base
    return {
        "name": method.name,
        "summary": method.summary,
        "base": "needed" if method.needs_base else "possible" if uses_base else "none",
        "least": least,
        "most": most,
        "parameters": [_tell(one) for one in method.parameters if one.name not in _HIDDEN],
    }


def _tell(parameter: Parameter) -> dict[str, Any]:
    span = parameter.span
    if span is None and parameter.kind == "fraction":
        span = RANGES["fraction"]
    return {
        "name": parameter.name,
        "help": parameter.help,
        "default": _default(parameter, span),
        "kind": parameter.kind,
        "words": parameter.words,
        "of_model": parameter.of_model,
        "span": span,
        "needs": parameter.needs,
    }


def _default(parameter: Parameter, span: tuple[float, float] | None) -> Any:
    """Give where a slider begins; what must be given begins in the middle, which for a weight is 1."""
    if parameter.default is not None or span is None:
        return parameter.default
    return sum(span) / 2


def read_request(asked: PlanRequest, offers: Offers) -> Wanted:
    """Check a merge that the page asks for.

    Raises
    ------
    Refusal
        400 where something is not possible, 404 for a file that there is not.
    """
    try:
        method = find_method(asked.method)
        models = tuple(
            (offers.take(one.file), _check(method, one.parameters, of_model=True))
            for one in asked.models
        )
        parameters = _check(method, asked.parameters, of_model=False)
    except RecipeError as error:
        raise Refusal(400, str(error)) from None
    if asked.type not in TYPES:
        raise Refusal(400, f"the type {asked.type[:40]!r} is none of {', '.join(TYPES)}")
    base = None if asked.base is None else offers.take(asked.base, ("model",))
    keys = [offer.key for offer, _ in models] + ([base.key] if base is not None else [])
    if len(set(keys)) < len(keys):
        raise Refusal(400, "one file is taken twice; take each once")
    if base is None and any(offer.kind == "delta" for offer, _ in models):
        raise Refusal(400, "a delta needs the base that it was made from; choose one")
    return Wanted(method, base, models, parameters, asked.type, asked.seed)


def _check(method: Method, given: Mapping[str, Any], *, of_model: bool) -> dict[str, Any]:
    known = method.parameters_of(model=of_model)
    checked = {}
    for name, value in given.items():
        if name not in known:
            raise RecipeError(f"{method.name} has no parameter {name[:40]!r} there", field=name)
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"the parameter {name} is no number", field=name)
        checked[name] = known[name].check(value)
    return checked
