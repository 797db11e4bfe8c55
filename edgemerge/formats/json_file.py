"""Files of JSON or text from strangers: bounded size, and named errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.finding.json_objects import MAX_VALUES, parse_object
from edgemerge.formats.files import read_bounded

__all__ = ["MAX_BYTES", "MAX_VALUES", "read_object", "read_text"]

MAX_BYTES = 8_000_000


def read_object(
    path: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_values: int = MAX_VALUES,
    allows_infinity: bool = False,
) -> dict[str, Any]:
    """Read a file of at most `max_bytes` that must hold one JSON object; see `parse_object`."""
    raw = read_bounded(path, max_bytes)
    return parse_object(raw, path, max_values=max_values, allows_infinity=allows_infinity)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file."""
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as e:
        raise FormatError("is not UTF-8 text; get the file again", path=path) from e
