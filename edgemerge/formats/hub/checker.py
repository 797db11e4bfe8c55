"""Values of config.json, each refused by name when it is not what it must be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError

__all__ = ["MAX_COUNT", "Checker"]

MAX_COUNT = (1 << 31) - 1  # llama.cpp keeps counts in 32 bits
SMALLEST, LARGEST = 1e-38, 1e38  # and numbers as float32


class Checker:
    """Reads config.json; what it does not state comes from transformers' defaults.

    Parameters
    ----------
    raw : dict
        The parsed file.
    path : Path
        The file, named in errors.
    defaults : mapping
        By key of config.json.
    """

    def __init__(self, raw: dict[str, Any], path: Path, defaults: Mapping[str, Any]) -> None:
        self.raw = raw
        self.path = path
        self.defaults = defaults

    def get(self, key: str) -> Any:
        """Return a value as it is; null counts as not stated."""
        value = self.raw.get(key)
        return self.defaults.get(key) if value is None else value

    def refuse(self, key: str, value: object, wanted: str) -> FormatError:
        """Make the error that says what a key must be."""
        return FormatError(
            f"{key} is {str(value)[:80]!r}, it must be {wanted}; correct the file", path=self.path
        )

    def unlike(self, key: str, value: object, wanted: str) -> FormatError:
        """Make the error for a model that llama.cpp computes in one way only."""
        return FormatError(
            f"{key} is {str(value)[:80]!r}, but llama.cpp computes such models with {wanted}; "
            "this one cannot be converted",
            path=self.path,
        )

    def count(self, key: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        """Return an integer from 1 to `most`."""
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise FormatError(f"{key} is missing; get the file again", path=self.path)
        if type(value) is not int or not 1 <= value <= most:
            raise self.refuse(key, value, f"an integer from 1 to {most}")
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        table: Mapping[str, Any] | None = None,
        most: float = LARGEST,
    ) -> float:
        """Return a positive number up to `most`, of the file or of a table within it."""
        value = self.get(key) if table is None else table.get(key)
        if value is None:
            value = default
        # A bool is an int to isinstance.
        is_bool = isinstance(value, bool)
        if isinstance(value, int | float) and not is_bool and SMALLEST <= value <= most:
            return float(value)
        wanted = "a positive number" if most == LARGEST else f"a positive number up to {most:g}"
        raise self.refuse(key, value, wanted)

    def size(self, key: str, n: int) -> int:
        """Return a count that was computed with the value of a key, where llama.cpp can hold it."""
        if not 1 <= n <= MAX_COUNT:
            raise FormatError(
                f"{key} of {str(self.get(key))[:80]} makes a size of {n:.3g}, it must be from 1 to "
                f"{MAX_COUNT}; correct the file",
                path=self.path,
            )
        return n

    def flag(self, key: str) -> bool:
        """Return true or false; false where nothing is stated."""
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value
