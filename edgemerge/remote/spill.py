"""A file on this machine in which what was read of a remote one is kept, to be read again."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgemerge.errors import OutputError

__all__ = ["Spill"]

PUNCH_HOLE, KEEP_SIZE = 2, 1  # linux/falloc.h


@dataclass(eq=False, slots=True)
class _Use:
    """A range that is read or written; spoilt where it is forgotten meanwhile: zeros may be there."""

    start: int
    stop: int
    is_spoilt: bool = False


class Spill:
    """Ranges of a remote file, in a file without a name: the system frees it whatever ends the process.

    Parameters
    ----------
    folder : Path
        Where the file is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._fail(error) from None
        self._starts: list[int] = []  # of ranges that are there; disjoint, in order
        self._stops: list[int] = []
        self._uses: list[_Use] = []  # under way
        self._lock = threading.Lock()

    def read(self, buffers: list[memoryview], offset: int) -> bool:
        """Fill buffers from byte `offset` of the remote file, if all of them are here."""
        with self._using(offset, offset + sum(map(len, buffers))) as use:
            if not self._has(use):
                return False
            for buffer in buffers:
                at = 0
                while at < len(buffer):
                    n_read = os.preadv(self._file.fileno(), [buffer[at:]], offset)
                    if n_read == 0:
                        return False
                    at, offset = at + n_read, offset + n_read
        return not use.is_spoilt

    def write(self, buffers: list[memoryview], offset: int) -> None:
        """Keep what was read.

        Raises
        ------
        OutputError
            The disk is full, or fails.
        """
        with self._using(offset, offset + sum(map(len, buffers))) as use:
            for buffer in buffers:
                at = 0
                while at < len(buffer):
                    try:
                        n_written = os.pwrite(self._file.fileno(), buffer[at:], offset)
                    except OSError as error:
                        raise self._fail(error) from None
                    at, offset = at + n_written, offset + n_written
            with self._lock:
                if not use.is_spoilt:
                    self._put(use.start, use.stop)

    def forget(self, offset: int, n_bytes: int) -> None:
        """Give a range back to the file system."""
        stop = offset + n_bytes
        with self._lock:
            kept = list(zip(self._starts, self._stops, strict=True))
            parts = [
                part
                for a, b in kept
                for part in ((a, min(b, offset)), (max(a, stop), b))
                if part[0] < part[1]
            ]
            self._starts, self._stops = [a for a, _ in parts], [b for _, b in parts]
            for use in self._uses:
                use.is_spoilt |= use.start < stop and offset < use.stop
            _punch(self._file.fileno(), offset, n_bytes)

    def close(self) -> None:
        """Give all of it back."""
        self._file.close()

    @contextmanager
    def _using(self, start: int, stop: int) -> Iterator[_Use]:
        """Notice whether a range is forgotten while it is read or written."""
        use = _Use(start, stop)
        with self._lock:
            self._uses.append(use)
        try:
            yield use
        finally:
            with self._lock:
                self._uses.remove(use)

    def _has(self, use: _Use) -> bool:
        with self._lock:
            i = bisect_right(self._starts, use.start) - 1
            return i >= 0 and self._stops[i] >= use.stop

    def _put(self, start: int, stop: int) -> None:
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:  # what touches the range becomes one with it
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    def _fail(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot keep what is read twice ({error.strerror}); free some of this disk, or leave "
            "out --spill",
            path=self._folder,
        )


def _punch(fd: int, offset: int, n_bytes: int) -> None:
    """Free a range's blocks; a hint, which some file systems do not know."""
    fallocate = _libc().fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if n_bytes > 0:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, n_bytes)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
