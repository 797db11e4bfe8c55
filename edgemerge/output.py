"""The output file: written beside its name as a part, renamed when it is whole.

Nothing under the final name is touched before the last step, so an interrupted or failed merge leaves
what was there. The part is locked: a second merge to the same name is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from pathlib import Path
from types import TracebackType

from edgemerge.budget import format_size
from edgemerge.errors import OutputError
from edgemerge.types import UInt8

__all__ = ["OutputFile", "check_output"]

CHUNK = 1 << 20


def check_output(path: Path, inputs: tuple[Path, ...], *, force: bool) -> None:
    """Refuse an output that cannot or must not be written, before any work.

    Raises
    ------
    OutputError
        It exists and `force` is not given, is one of the inputs, or its folder is missing.
    """
    if path.is_dir():
        raise OutputError("is a folder; give a file name such as merged.gguf", path=path)
    if path.resolve() in inputs:
        raise OutputError("is one of the inputs; choose another name", path=path)
    if path.exists() and not force:
        raise OutputError("exists already; choose another name or give --force", path=path)
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; make it first", path=path)


class OutputFile:
    """`NAME.part`, with its space reserved up front; `publish` gives it its name.

    Used as a context manager: left without `publish`, the part is removed.

    Raises
    ------
    OutputError
        The folder cannot be written, the disk is too full, or another merge writes the same file.
    """

    def __init__(self, path: Path, n_bytes: int) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.n_bytes = n_bytes
        self._published = False
        try:
            self._fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", path=path) from error
        try:
            self._lock()
            self._reserve()
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                "another merge is writing it; wait for that one", path=self.path
            ) from error

    def _reserve(self) -> None:
        """Allocate every block now, so that a full disk is known before the work."""
        os.ftruncate(self._fd, 0)
        free = os.fstatvfs(self._fd)
        available = free.f_bavail * free.f_frsize
        try:
            if available < self.n_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._fd, 0, self.n_bytes)
        except OSError as error:
            self.part.unlink(missing_ok=True)
            missing = format_size(max(0, self.n_bytes - available))
            raise OutputError(
                f"needs {format_size(self.n_bytes)} and the disk lacks {missing} of it "
                f"({error.strerror}); free some space or choose another disk",
                path=self.path,
            ) from error

    def write(self, data: UInt8 | bytes, offset: int) -> None:
        """Write all of a buffer at a position; thread-safe.

        Raises
        ------
        OutputError
            The disk refused.
        """
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise OutputError(f"could not be written ({error.strerror})", path=self.path) from error

    def sha256(self) -> str:
        """Hash the file as it stands on disk."""
        digest = hashlib.sha256()
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        at = 0
        while n_read := os.preadv(self._fd, [view], at):
            digest.update(view[:n_read])
            at += n_read
        return digest.hexdigest()

    def publish(self) -> None:
        """Make the file durable and give it its final name, replacing what was there.

        Raises
        ------
        OutputError
            The disk refused.
        """
        try:
            os.fsync(self._fd)
            os.replace(self.part, self.path)
            self._published = True
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise OutputError(
                f"could not be finished ({error.strerror})", path=self.path
            ) from error

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._published:
            with contextlib.suppress(OSError):
                self.part.unlink()
        os.close(self._fd)
