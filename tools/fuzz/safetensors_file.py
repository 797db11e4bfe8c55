"""The header of a safetensors file."""

from __future__ import annotations

from pathlib import Path

from edgemerge.formats.hub.safetensors import read_header

__all__ = ["read_safetensors"]


def read_safetensors(data: bytes, folder: Path) -> None:
    """Read an input as a safetensors file, and see that every tensor is inside it."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    for tensor in read_header(path).values():
        assert 8 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)
