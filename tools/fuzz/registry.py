"""Metadata of a registry: a root, or an index whose entries are read.

The input's first line says which: root or index. The rest is what the file holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, Targets
from tuf.api.serialization import DeserializationError

from edgemerge.fleet.registry.entries import read_entry
from edgemerge.fleet.registry.verified import load_root

__all__ = ["read_registry"]


def read_registry(data: bytes, folder: Path) -> None:
    """Read an input as if its signatures were good."""
    kind, _, content = data.partition(b"\n")
    if kind == b"root":
        load_root(content, "root.json")
    elif kind == b"index":
        try:
            found: Metadata[Any] = Metadata.from_bytes(content)
        except DeserializationError:
            return
        if isinstance(found.signed, Targets):
            for path, target in found.signed.targets.items():
                read_entry(path, target, "targets.json")
