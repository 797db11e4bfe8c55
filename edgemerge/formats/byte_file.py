"""Where the bytes of models are read: from an open file on this machine, or over the network."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgemerge.errors import FormatError
from edgemerge.formats.descriptors import READ_FILES
from edgemerge.formats.files import check_unchanged, fill_buffers, forget_range, was_cached
from edgemerge.remote.stand_ins import find_remote
from edgemerge.types import FileState

if TYPE_CHECKING:  # a merge of files here does without what talks to servers
    from edgemerge.remote.ranged import RangedFile

__all__ = ["ByteFile", "open_file"]


class ByteFile(Protocol):
    """An open file that is read by ranges; reading is thread-safe."""

    path: Path
    state: FileState  # when it was opened
    is_regular: bool  # neither a pipe nor a device
    work_bytes: int  # of memory that a thread takes to read

    def read(self, n_bytes: int, offset: int) -> bytes:
        """Return bytes from an offset on; fewer where the file ends."""

    def fill(
        self,
        buffers: list[memoryview],
        offset: int,
        tensor: str | None,
        run: tuple[int, int] | None = None,
    ) -> None:
        """Fill buffers one after the other.

        Parameters
        ----------
        buffers : list of memoryview
            Of bytes.
        offset : int
            Where to begin in the file.
        tensor : str, optional
            Named in an error.
        run : (int, int), optional
            First byte, and last + 1, of a run that is probably read in order.

        Raises
        ------
        FormatError
            The file ends before they are full, or it cannot be read.
        """

    def forget(self, offset: int, n_bytes: int) -> None:
        """Drop what the system keeps of a range; a hint."""

    def check_unchanged(self) -> None:
        """Raise FormatError where the file was written to since it was opened."""

    def close(self) -> None:
        """Close the file."""


def open_file(path: Path) -> ByteFile:
    """Open a file, or what a path stands for.

    Raises
    ------
    OSError
        It cannot be opened.
    """
    remote = find_remote(path)
    return _LocalFile(path) if remote is None else _RemoteFile(path, remote)


class _LocalFile:
    work_bytes = 0  # rows go straight to where they are read into

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = READ_FILES.open(path)
        self.is_regular, self.state = self._file.is_regular, self._file.state
        try:
            with READ_FILES.reading(self._file) as fd:
                self._stays_cached = self.is_regular and was_cached(fd)
        except BaseException:
            READ_FILES.close(self._file)
            raise

    def read(self, n_bytes: int, offset: int) -> bytes:
        with READ_FILES.reading(self._file) as fd:
            return os.pread(fd, n_bytes, offset)

    def fill(
        self,
        buffers: list[memoryview],
        offset: int,
        tensor: str | None,
        run: tuple[int, int] | None = None,
    ) -> None:
        try:
            with READ_FILES.reading(self._file) as fd:
                fill_buffers(fd, buffers, offset, self.path, tensor)
        except (
            OSError
        ) as error:  # of many files, those that were not read for long are opened again
            raise FormatError(
                f"cannot be opened again ({error.strerror}); see that it stays there and start again",
                path=self.path,
                tensor=tensor,
            ) from error

    def forget(self, offset: int, n_bytes: int) -> None:
        if not self._stays_cached:  # who put it there may want it again
            with READ_FILES.reading(self._file) as fd:
                forget_range(fd, offset, n_bytes)

    def check_unchanged(self) -> None:
        with READ_FILES.reading(self._file) as fd:
            check_unchanged(fd, self.state)

    def close(self) -> None:
        READ_FILES.close(self._file)


class _RemoteFile:
    is_regular = True

    def __init__(self, path: Path, remote: RangedFile) -> None:
        self.path, self._remote = path, remote
        remote.start()  # who read it before may have been stopped
        self.work_bytes = remote.work_bytes
        known = repr((str(remote.address), *remote.identity)).encode()
        number = int.from_bytes(hashlib.blake2b(known, digest_size=8).digest())
        self.state = FileState(path, number, remote.identity.n_bytes, 0)

    def read(self, n_bytes: int, offset: int) -> bytes:
        n_bytes = max(0, min(n_bytes, self.state.n_bytes - offset))
        raw = bytearray(n_bytes)
        self._remote.fill([memoryview(raw)], offset, (0, 0))
        return bytes(raw)

    def fill(
        self,
        buffers: list[memoryview],
        offset: int,
        tensor: str | None,
        run: tuple[int, int] | None = None,
    ) -> None:
        self._remote.fill(buffers, offset, run or (0, 0))

    def forget(self, offset: int, n_bytes: int) -> None:
        self._remote.forget(offset, n_bytes)

    def check_unchanged(self) -> None:
        self._remote.check_unchanged()

    def close(self) -> None:
        """Leave the connections to who opens the file again; they end with the process."""
