"""What paths are called where people read them: one that stands for a remote model has its address."""

from __future__ import annotations

import os

__all__ = ["call_path", "forget_paths", "names_of_paths", "shown_path"]

_names: dict[str, str] = {}  # path -> what is shown in its place


def call_path(path: str | os.PathLike[str], name: str) -> None:
    """Show a name in the place of a path, and of all below it."""
    _names[os.fspath(path)] = name


def names_of_paths() -> dict[str, str]:
    """Return all paths that are called otherwise, and what they are called."""
    return dict(_names)


def forget_paths() -> None:
    """Show all paths as they are again."""
    _names.clear()


def shown_path(path: str | os.PathLike[str]) -> str:
    """Return a path, or a reference with several, as it is shown."""
    text = os.fspath(path)
    for known, name in _names.items():
        text = text.replace(known, name)
    return text
