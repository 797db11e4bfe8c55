"""What of a file is in the page cache."""

from __future__ import annotations

from pathlib import Path

from edgemerge.formats.files import cached_share


def share_of(path: Path) -> float:
    """Share of a file's pages that are in memory."""
    with path.open("rb") as file:
        return cached_share(file.fileno())
