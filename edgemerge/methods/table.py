"""All merge methods, gathered from the files of their families."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from edgemerge.errors import RecipeError
from edgemerge.methods.covariance import COVARIANCE
from edgemerge.methods.fusion import ARCEE_FUSION
from edgemerge.methods.gram_combined import GRAM_COMBINED
from edgemerge.methods.hierarchical import HIERARCHICAL
from edgemerge.methods.linear import LINEAR, PASSTHROUGH
from edgemerge.methods.lines import LINES
from edgemerge.methods.method import Method
from edgemerge.methods.nearswap import NEARSWAP
from edgemerge.methods.parameters import LAMBDA, RAMP, Parameter
from edgemerge.methods.ram import RAM, RAMPLUS_TL
from edgemerge.methods.resmerge import RESMERGE
from edgemerge.methods.sce import SCE
from edgemerge.methods.slerp import SLERP
from edgemerge.methods.spectral import SPECTRAL
from edgemerge.methods.task_vectors import TASK_VECTOR_METHODS
from edgemerge.types import Gradient, Setting

__all__ = ["METHODS", "find_method", "known_parameters", "list_presets"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR,
        *TASK_VECTOR_METHODS,
        LINES,
        SCE,
        RAM,
        RAMPLUS_TL,
        HIERARCHICAL,
        COVARIANCE,
        *SPECTRAL,
        RESMERGE,
        SLERP,
        *GRAM_COMBINED,
        ARCEE_FUSION,
        NEARSWAP,
        PASSTHROUGH,
    )
}


def find_method(name: str) -> Method:
    """Look a method up.

    Raises
    ------
    RecipeError
        There is none of that name; the message lists those that there are.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(METHODS)}"
        raise RecipeError(f"unknown merge method {name!r}; {hint}", field="merge_method")
    return METHODS[name]


def known_parameters() -> dict[str, tuple[Parameter, ...]]:
    """Return the parameters of all methods by name, those of models first.

    A name has several where methods mean something else by it, as in mergekit.
    """
    found: dict[str, dict[str, Parameter]] = {}
    for method in METHODS.values():
        for parameter in method.parameters:
            found.setdefault(parameter.name, {})[parameter.help] = parameter
    known = {name: tuple(meanings.values()) for name, meanings in found.items()}
    return dict(sorted(known.items(), key=lambda item: not item[1][0].of_model))


def list_presets() -> dict[str, dict[str, Mapping[str, Setting | Gradient]]]:
    """Return all presets: name of a preset -> method -> parameters.

    `paper` is the section on baselines of arXiv 2511.13373. Its weights are not published. The formulas
    that it gives for linear and task arithmetic have weights that sum to one, and we take them equal.

    `ramp` is a lambda that grows with depth, for every method that has a lambda. Its ends are from
    docs/quality.md; LiNeS (arXiv 2410.17146) has the idea.
    """
    presets: dict[str, dict[str, Mapping[str, Setting | Gradient]]] = {}
    for method in METHODS.values():
        if any(parameter.name == LAMBDA.name for parameter in method.parameters):
            presets.setdefault("ramp", {})[method.name] = {LAMBDA.name: RAMP}
        for name, settings in method.presets.items():
            presets.setdefault(name, {})[method.name] = settings
    return presets
