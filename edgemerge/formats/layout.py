"""The layout of a file to be: what it begins with, and where each tensor will lie."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FileLayout"]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """First bytes and absolute tensor offsets of one file; of a file without tensors, all bytes."""

    header: bytes  # tensor data begins at len(header)
    offsets: dict[str, int]  # GGUF tensor name -> absolute position
    n_bytes: int  # of the finished file
