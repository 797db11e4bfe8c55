"""JSON that tests compare with, stored as .json.xz."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

__all__ = ["read_packed_json", "write_packed_json"]


def read_packed_json(path: Path) -> Any:
    """Return what a file holds."""
    return json.loads(lzma.decompress(path.read_bytes()))


def write_packed_json(path: Path, value: Any) -> None:
    """Write a value; the same value gives the same bytes."""
    path.write_bytes(lzma.compress(json.dumps(value).encode(), preset=9))
