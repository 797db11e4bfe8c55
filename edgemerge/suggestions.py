"""What a user may have meant: the nearest word that is known, the nearest name in a folder."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["find_closest", "suggest", "suggest_path"]

MAX_NAMES = 10_000  # of a folder; a larger one is not compared


def suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `did you mean 'WORD'?`, or else `known are ...`; upper and lower case are one."""
    names = list(known)
    close = find_closest(word, names, cutoff)
    return f"known are {', '.join(names)}" if close is None else f"did you mean {close!r}?"


def find_closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that is nearest to one, None where none is near; upper and lower case are one."""
    folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[close[0]] if close else None


def suggest_path(path: str | os.PathLike[str]) -> str:
    """Return `; did you mean 'PATH'?` where the folder holds a similar name, else nothing."""
    path = Path(path)
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry, _ in zip(entries, range(MAX_NAMES), strict=False)]
    except (OSError, ValueError):
        return ""
    if path.name in names:  # it is there, and of the wrong kind
        return ""
    close = difflib.get_close_matches(path.name, sorted(names), n=1, cutoff=0.75)
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else ""
