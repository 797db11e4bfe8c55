"""Descriptors of the files that are read: a merge of a thousand deltas does with those of a few hundred."""

from __future__ import annotations

import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgemerge.formats.files import check_unchanged, read_state

__all__ = ["READ_FILES", "OpenFile", "OpenFiles"]

MOST = 4096  # where the system would let us have more
FLAGS = (
    os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
)  # a pipe in the place of a model must not hang us


class OpenFile:
    """A file that is read. Its descriptor may be closed between two reads, and opened again.

    Attributes
    ----------
    state : FileState
        What the file was when it was opened first.
    is_regular : bool
        Neither a pipe nor a device; these stay open.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = Path(os.path.abspath(path))
        self.is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self.state = read_state(fd, path)
        self.fd, self.readers = fd, 0  # -1: closed; both under the lock of `OpenFiles`


class OpenFiles:
    """Files of which some have descriptors: the least recently read is closed for another. Thread-safe.

    Parameters
    ----------
    most : int, optional
        Descriptors; more only where more threads read at once. Else half of what the process may have.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most or _half_of_limit()
        self._lock = threading.Lock()
        self._with_fd: OrderedDict[OpenFile, None] = OrderedDict()  # the least recently read first

    def open(self, path: Path) -> OpenFile:
        """Open a file.

        Raises
        ------
        OSError
            It cannot be opened.
        """
        with self._lock:
            self._make_room()
            fd = os.open(path, FLAGS)
            try:
                file = OpenFile(path, fd)
            except BaseException:
                os.close(fd)
                raise
            if file.is_regular:
                self._with_fd[file] = None
        return file

    @contextmanager
    def reading(self, file: OpenFile) -> Iterator[int]:
        """Give a descriptor that stays open as long as the context.

        Raises
        ------
        FormatError
            The file was opened again, and is another one or was written to.
        OSError
            It cannot be opened again.
        """
        with self._lock:
            if file.fd < 0:
                self._make_room()
                file.fd = self._reopen(file)
            file.readers += 1
            if file.is_regular:
                self._with_fd[file] = None
                self._with_fd.move_to_end(file)
        try:
            yield file.fd
        finally:
            with self._lock:
                file.readers -= 1

    def close(self, file: OpenFile) -> None:
        """Close a file for good."""
        with self._lock:
            self._with_fd.pop(file, None)
            if file.fd >= 0:
                os.close(file.fd)
                file.fd = -1

    def _make_room(self) -> None:
        if len(self._with_fd) < self._most:
            return
        file = next((file for file in self._with_fd if not file.readers), None)
        if file is not None:
            del self._with_fd[file]
            os.close(file.fd)
            file.fd = -1

    def _reopen(self, file: OpenFile) -> int:
        fd = os.open(file.path, FLAGS)
        try:
            check_unchanged(fd, file.state)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _half_of_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(8, min(MOST, soft // 2))


READ_FILES = OpenFiles()
"""All files that this process reads models from."""
