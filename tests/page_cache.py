"""What of a file is in the page cache, and how to empty it of the file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from edgemerge.formats.files import cached_share


def share_of(path: Path) -> float:
    """Share of a file's pages that are in memory."""
    with path.open("rb") as file:
        return cached_share(file.fileno())


def is_dropped(paths: Iterable[Path]) -> bool:
    """Drop files from the page cache; False where a disk lets none go, as one in memory."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return all(share_of(path) < 0.05 for path in paths)
