"""One process at a time changes the folder of a device."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from edgemerge.errors import OutputError

__all__ = ["Busy", "lock_folder"]


class Busy(OutputError):
    """Another process changes the folder."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the one process that changes a folder; a lock ends with its process.

    Raises
    ------
    Busy
        Another process has the lock.
    OutputError
        The disk takes no changes.
    """
    path = folder / "lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise OutputError(
            f"cannot be written ({error.strerror}); see to its disk, or to who owns it", path=path
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy("another update is at work there; wait for that one", path=folder) from error
        yield
