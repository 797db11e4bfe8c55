"""Tables that many files have alike, kept once: a thousand deltas of one base list the same tensors."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

__all__ = ["share_table"]

V = TypeVar("V", bound=Hashable)


class _Table(dict[str, V]):
    """A dict that can be referred to weakly."""

    __slots__ = ("__weakref__",)


_known: WeakValueDictionary[tuple[Any, ...], _Table[Any]] = WeakValueDictionary()


def share_table(table: dict[str, V]) -> dict[str, V]:
    """Return a table with the same items in the same order, the same object for all who ask; only to read."""
    key = tuple(table.items())
    found: _Table[V] | None = _known.get(key)
    if found is None:
        found = _known[key] = _Table(table)
    return found
