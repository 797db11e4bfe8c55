"""References to models, as mergekit writes them: `PATH@REVISION+ADAPTER`, or tables of these."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Reference", "read_reference"]


class Reference(NamedTuple):
    """A model, with what is to be added to it."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    has_architecture: bool = (
        False  # whether `override_architecture` says another than the model's own
    )


def read_reference(value: Any) -> Reference | None:
    """Read a text, or a table with model, lora and override_architecture; None for anything else."""
    if isinstance(value, str):
        model, plus, adapter = value.partition("+")
        found = _read_path(model)
        if found is None or (plus and not adapter):
            return None
        return Reference(*found, adapter or None)
    if not isinstance(value, dict):
        return None
    found = _read_path(value.get("model"))
    if found is None:
        return None
    lora = value.get("lora")
    adapter_path = None if lora is None else _read_path(lora)
    if lora is not None and adapter_path is None:
        return None
    return Reference(
        *found,
        adapter=None if adapter_path is None else "@".join(filter(None, adapter_path)),
        has_architecture=value.get("override_architecture") is not None,
    )


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
