"""References to models, as mergekit writes them: `PATH@REVISION+ADAPTER`, or tables of these."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from edgemerge.formats.adapters.reference import split_weight

__all__ = ["AdapterName", "Reference", "read_reference"]


class AdapterName(NamedTuple):
    """A LoRA adapter that is to be added to a model."""

    path: str
    revision: str | None = None
    weight: float = 1.0  # by which its change is multiplied


class Reference(NamedTuple):
    """A model, with what is to be added to it."""

    path: str
    revision: str | None = None
    adapters: tuple[AdapterName, ...] = ()
    has_architecture: bool = (
        False  # whether `override_architecture` says another than the model's own
    )


def read_reference(value: Any) -> Reference | None:
    """Read a text, or a table with model, lora and override_architecture; None for anything else."""
    if isinstance(value, str):
        model, *others = value.split("+")
        found, adapters = _read_path(model), tuple(map(_read_adapter, others))
        if found is None or None in adapters:
            return None
        return Reference(*found, tuple(adapter for adapter in adapters if adapter))
    if not isinstance(value, dict):
        return None
    found, lora = _read_path(value.get("model")), value.get("lora")
    entries = lora if isinstance(lora, list) else [] if lora is None else [lora]
    adapters = tuple(map(_read_adapter, entries))
    if found is None or None in adapters:
        return None
    return Reference(
        *found,
        tuple(adapter for adapter in adapters if adapter),
        has_architecture=value.get("override_architecture") is not None,
    )


def _read_adapter(value: Any) -> AdapterName | None:
    """Read `ADAPTER`, `0.5*ADAPTER`, or a table that may have a weight."""
    weight: Any = 1.0
    if isinstance(value, str):
        value, weight = split_weight(value)
    elif isinstance(value, dict):
        weight = value.get("weight", 1.0)
    found = _read_path(value)
    if found is None or isinstance(weight, bool) or not isinstance(weight, int | float):
        return None
    return AdapterName(*found, float(weight)) if math.isfinite(weight) else None


def _read_path(value: Any) -> tuple[str, str | None] | None:
    """Split a path from its revision."""
    if isinstance(value, str):
        path, _, tag = value.partition("@")
        return (path, tag or None) if path and "@" not in tag else None
    if not isinstance(value, dict):
        return None
    name, revision = value.get("path"), value.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        return None
    return name, revision
