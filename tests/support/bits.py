"""Damage to files."""

from __future__ import annotations

from pathlib import Path

__all__ = ["flip_bit"]


def flip_bit(path: Path, i_bit: int) -> None:
    """Turn one bit of a file over, in place; done twice, it is as it was."""
    with path.open("r+b") as file:
        file.seek(i_bit // 8)
        (byte,) = file.read(1)
        file.seek(i_bit // 8)
        file.write(bytes([byte ^ 1 << i_bit % 8]))
