"""The folder for what can be made again."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from edgemerge.errors import OutputError

__all__ = ["users_cache"]


def users_cache() -> Path:
    """Return edgemerge's folder in the user's cache, as the XDG Base Directory Specification has it.

    Raises
    ------
    OutputError
        The user has no home, and the folder for those without one belongs to somebody else.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "edgemerge"
    try:
        return Path.home() / ".cache" / "edgemerge"
    except RuntimeError:  # in a container: no HOME, and nobody has this number
        return _cache_without_home()


def _cache_without_home() -> Path:
    """Return a folder that this user alone writes, for kernels are kept in it and run."""
    folder = Path(tempfile.gettempdir()) / f"edgemerge-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    with suppress(OSError):
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if is_own and not found.st_mode & 0o022:
            return folder
    raise OutputError(
        "this user has no home, and this folder is not the user's own; set HOME or XDG_CACHE_HOME",
        path=folder,
    )
