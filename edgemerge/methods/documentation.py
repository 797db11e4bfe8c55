"""The tables of methods and parameters that the documentation shows, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgemerge.methods.method import Method
from edgemerge.methods.parameters import INT8_MASK, WEIGHT, Parameter
from edgemerge.methods.table import METHODS, known_parameters
from edgemerge.types import InputTensor, Setting, TensorSpec

__all__ = ["methods_table", "parameters_table"]


def methods_table() -> str:
    """Return a row per method: name, what it does, parameters beside `weight` with defaults, reads.

    Reads are the passes over the inputs with defaults and, where there is a density, a density below 1.
    """
    rows = [
        (f"`{method.name}`", method.summary, _parameters(method), str(_reads(method)))
        for method in METHODS.values()
    ]
    return _table(("method", "what it does", "parameters beside `weight`", "reads"), rows)


def parameters_table() -> str:
    """Return a row per parameter: name, what it does, allowed values, whose it is.

    A name with several meanings has a row for each, which names the methods.
    """
    rows = [
        (
            f"`{p.name}`",
            p.help,
            p.allowed(),
            ("each model" if p.of_model else "the merge")
            + (_methods_of(p) if len(meanings) > 1 else ""),
        )
        for meanings in known_parameters().values()
        for p in meanings
    ]
    return _table(("parameter", "what it does", "allowed", "belongs to"), rows)


def _methods_of(parameter: Parameter) -> str:
    """Name the methods in which a parameter means what it does here."""
    same = [
        method.name
        for method in METHODS.values()
        if any((p.name, p.help) == (parameter.name, parameter.help) for p in method.parameters)
    ]
    return f" ({', '.join(same)})"


def _parameters(method: Method) -> str:
    shown = [p for p in method.parameters if p.name not in (WEIGHT.name, INT8_MASK.name)]
    return ", ".join(f"`{p.name}` ({_default(p)})" for p in shown)


def _default(parameter: Parameter) -> str:
    if parameter.default is None:
        return "required"
    if isinstance(parameter.default, bool):
        return str(parameter.default).lower()
    if parameter.kind == "count":
        return f"{parameter.default:g}"
    return f"{parameter.default}"


@dataclass(frozen=True)
class _Example:
    """A tensor of two models, as far as a method asks about it."""

    base: InputTensor | None
    experts: tuple[InputTensor, ...]
    settings: dict[str, Setting]
    name: str = "output.weight"
    n_cols: int = 256


def _reads(method: Method) -> int:
    own = method.defaults(model=True)
    if "density" in own:
        own["density"] = 0.5
    spec = TensorSpec(_Example.name, (256, 256), "F32", 4 * 256 * 256)
    experts = tuple(InputTensor(i, spec, own) for i in range(2))
    base = InputTensor(2, spec) if method.needs_base else None
    return method.passes(_Example(base, experts, method.defaults(model=False)))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
