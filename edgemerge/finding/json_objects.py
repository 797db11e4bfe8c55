"""JSON from strangers: one object, with bounds for values and depth, and named errors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError

__all__ = ["MAX_VALUES", "parse_object"]

# Python needs some 60 bytes for the smallest value, so 100 MB of "[[],[],…" would become gigabytes.
# Commas and opening brackets bound the number of values without parsing; those inside strings are
# counted too, which only tightens the bound. The text takes up to four bytes for one of the file.
MAX_VALUES = 250_000


def parse_object(
    raw: bytes,
    path: Path,
    *,
    max_values: int = MAX_VALUES,
    unique_keys: bool = False,
    allows_infinity: bool = False,
) -> dict[str, Any]:
    """Parse UTF-8 bytes that must hold one JSON object.

    Parameters
    ----------
    raw : bytes
        What was read.
    path : Path
        Named in errors.
    max_values : int
        More values than this are refused before anything is parsed.
    unique_keys : bool
        Refuse an object that names a key twice; otherwise the last one wins, as in Python.
    allows_infinity : bool
        Read `Infinity`, which is not JSON, and which transformers 4 writes.

    Raises
    ------
    FormatError
        Not UTF-8, not JSON, not an object, too many values, or nested too deeply.
    """
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > max_values:
        raise FormatError(
            f"holds more than {max_values} JSON values, which no model needs; get the file again",
            path=path,
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise FormatError(
            f"has bytes that are not UTF-8 at position {e.start} of its JSON; get the file again",
            path=path,
        ) from e
    del raw  # Llama 3's tokenizer.json: 16 MB, the same again as text, and 90 MB of objects to come
    hook = _unique if unique_keys else None
    try:
        constant = _read_infinity if allows_infinity else _refuse_constant
        value = json.loads(text, object_pairs_hook=hook, parse_constant=constant)
    except RecursionError as e:
        raise FormatError(
            "nests its JSON too deeply, as only a hostile file does; get the file again", path=path
        ) from e
    except ValueError as e:  # JSONDecodeError, _unique, _refuse_constant, or an integer without end
        raise FormatError(f"is not valid JSON ({e}); get the file again", path=path) from e
    if not isinstance(value, dict):
        raise FormatError("holds JSON that is not an object; get the file again", path=path)
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:80]!r} appears twice")
        result[key] = value
    return result


def _read_infinity(name: str) -> Any:
    return _refuse_constant(name) if name == "NaN" else float(name)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
