"""The folder for what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["users_cache"]


def users_cache() -> Path:
    """Return edgemerge's folder in the user's cache, as the XDG Base Directory Specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgemerge"
