"""The output file: written beside its name as a part, and renamed when it is whole.

The final name is touched only in the last step, so an interrupted or failed merge leaves the old file. The
part is locked: a second merge to the same name is refused. A part that an earlier run left may be kept;
`edgemerge.output.journal` tells which of its tensors are finished.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from edgemerge.errors import OutputError
from edgemerge.formats.adapters.reference import expand_inputs
from edgemerge.formats.files import IOV_MAX, drop_bytes, forget_range, read_state, real_path
from edgemerge.formats.gguf.model import parts_of
from edgemerge.sizes import format_size
from edgemerge.types import FileState, UInt8

__all__ = ["OutputFile", "check_arrival", "check_name", "check_output", "finishing"]
__all__ += ["part_path", "read_chunks", "sync_folder", "write_all", "write_file"]

CHUNK = 1 << 20
_PRIVATE = 0o600


def check_output(path: Path, inputs: tuple[Path, ...], *, force: bool) -> None:
    """Refuse an output that cannot or must not be written, before any work.

    Raises
    ------
    OutputError
        It exists and `force` is not given, is no regular file, one of the inputs or a part of one,
        or its folder is missing.
    """
    check_name(path)
    inputs = tuple(real_path(given) for given in expand_inputs(inputs))
    read = {part for given in inputs for part in parts_of(given)}
    if any(_is_same(written, part) for written in (path, part_path(path)) for part in read):
        raise OutputError("is one of the inputs; choose another name", path=path)
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; make it first", path=path)
    if not os.path.lexists(path):
        return
    if not path.is_file() and not path.is_symlink():
        raise OutputError("is no regular file; choose another name", path=path)
    if real_path(path).parent in inputs and path.suffix != ".gguf":
        raise OutputError("belongs to one of the inputs; choose another name", path=path)
    if not force:
        raise OutputError("exists already; choose another name or give --force", path=path)


def check_arrival(check: Callable[[], None], note: str) -> None:
    """Check an output's name right before it is given; raises OutputError as `check` does.

    The error gets the note where something came under the name meanwhile.
    """
    try:
        check()
    except OutputError as error:
        if os.path.lexists(error.path):
            error.add_note(note)
        raise


def check_name(path: Path) -> None:
    """Refuse a path that names no file: `.`, `/`, the empty text, a folder.

    Raises
    ------
    OutputError
        It does.
    """
    if path.is_dir() or not path.name:
        raise OutputError("is a folder; give the name of a file", path=path)


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names are one file: the same path, or links, symbolic or hard."""
    with contextlib.suppress(OSError):
        return os.path.samefile(path, other)
    return real_path(path) == other  # neither need exist


def part_path(path: Path) -> Path:
    """Name the part under which a file is made."""
    return path.with_name(path.name + ".part")


class OutputFile:
    """`NAME.part`, with its space reserved up front; `publish` gives it its name.

    Used as a context manager: left without `publish`, the part is removed.

    Parameters
    ----------
    path : Path
        The final name.
    n_bytes : int
        Size of the finished file.
    keeps : bool
        Leave a part that is there as it is, also at the end; until `reserve` is called, only its lock
        is taken.
    is_private : bool
        Only its owner may read it.

    Attributes
    ----------
    keeps : bool
        Whether the part stays where the file is left without `publish`.
    is_ours : bool
        Whether the part is locked, and so ours to remove.
    """

    def __init__(
        self, path: Path, n_bytes: int, *, keeps: bool = False, is_private: bool = False
    ) -> None:
        self.path = path
        self.part = part_path(path)
        self.n_bytes = n_bytes
        self.keeps = keeps
        self._mode = _PRIVATE if is_private else 0o644
        self._published = False
        self._fd = -1
        self.is_ours = False

    def open(self) -> None:
        """Make the part and lock it. Call `__exit__` afterwards, also when this fails.

        Raises
        ------
        OutputError
            The folder cannot be written, the disk is too full, or another merge writes the same file.
        """
        while not self.is_ours:
            self._open_part()
            self.is_ours = self._lock_part()
        if not self.keeps:
            self.reserve()

    def _open_part(self) -> None:
        self._close()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._fd = os.open(self.part, flags, self._mode)
        except OSError as error:
            reason = error.strerror
            raise OutputError(f"cannot be written ({reason})", path=self.path) from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OutputError(
                f"{self.part.name} beside it is no regular file; remove it", path=self.path
            )
        if self._mode == _PRIVATE:  # also where an earlier run left the part
            os.fchmod(self._fd, _PRIVATE)

    def _lock_part(self) -> bool:
        """Lock the part. Return False where another merge, which had the lock, has renamed or removed it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                "another merge is writing it; wait for that one", path=self.path
            ) from error
        except OSError as error:
            raise OutputError(
                f"cannot be locked ({error.strerror}); choose a folder on a local disk",
                path=self.path,
            ) from error
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.part, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def reserve(self) -> None:
        """Allocate every block now, so that a full disk is known before the work.

        Where the part is kept, what is in it stays, cut or filled up by zeros to its size.

        Raises
        ------
        OutputError
            The disk has no room.
        """
        available = 0
        try:
            os.ftruncate(self._fd, self.n_bytes if self.keeps else 0)
            free = os.fstatvfs(self._fd)
            available = free.f_bavail * free.f_frsize + 512 * os.fstat(self._fd).st_blocks
            if available < self.n_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._fd, 0, self.n_bytes)
        except OSError as error:
            size = format_size(self.n_bytes)
            if error.errno == errno.ENOSPC:
                missing = max(0, self.n_bytes - available)
                lacks = f"lacks {format_size(missing)} of it" if missing else "is full"
                message = f"needs {size} and the disk {lacks}; free some space or choose another"
            else:
                message = f"needs {size}, which cannot be had there ({error.strerror})"
            raise OutputError(message, path=self.path) from error

    def _leave(self) -> None:
        """Remove the part, or keep it, then give up its lock."""
        if self.is_ours and not self.keeps and not self._published:
            with contextlib.suppress(OSError):
                self.part.unlink()
        if self.is_ours:  # a thread inside a sync would keep the lock
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def write(self, data: UInt8 | bytes | memoryview, offset: int) -> None:
        """Write all of a buffer at a position; thread-safe.

        Raises
        ------
        OutputError
            The disk refused.
        """
        try:
            write_all(self._fd, data, offset)
        except OSError as error:
            raise OutputError(f"could not be written ({error.strerror})", path=self.path) from error

    def write_items(self, items: list[memoryview], offset: int) -> None:
        """Write buffers one after the other at a position; thread-safe.

        Raises
        ------
        OutputError
            The disk refused.
        """
        try:
            while items:
                n_bytes = os.pwritev(self._fd, items[:IOV_MAX], offset)
                offset += n_bytes
                items = drop_bytes(items, n_bytes)
        except OSError as error:
            raise OutputError(f"could not be written ({error.strerror})", path=self.path) from error

    def read_items(self, items: list[memoryview], offset: int) -> None:
        """Fill buffers one after the other from a position.

        Raises
        ------
        OSError
            The disk refused, or the file ends before.
        """
        while items:
            n_bytes = os.preadv(self._fd, items[:IOV_MAX], offset)
            if n_bytes == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            offset += n_bytes
            items = drop_bytes(items, n_bytes)

    def chunks(self) -> Iterator[memoryview]:
        """Read the file as it is on disk. Each piece is valid until the next."""
        with finishing(self.path):
            yield from read_chunks(self._fd, 0, self.n_bytes)

    def forget(self, offset: int, n_bytes: int) -> None:
        """Give the pages of a piece back, so that it is read from the disk next time."""
        forget_range(self._fd, offset, n_bytes)

    def state(self) -> FileState:
        """Return what the part is now."""
        return read_state(self._fd, self.part)

    def publish(self) -> None:
        """Make the file durable and give it its final name, replacing what was there.

        Raises
        ------
        OutputError
            The disk refused.
        """
        self.sync()
        self.rename()

    def sync(self) -> None:
        """Make what was written durable.

        Raises
        ------
        OutputError
            The disk refused.
        """
        with finishing(self.path):
            os.fsync(self._fd)

    def sync_data(self) -> None:
        """Make what was written so far durable, in the middle of the work; thread-safe.

        Raises
        ------
        OutputError
            The disk refused.
        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise OutputError(f"could not be written ({error.strerror})", path=self.path) from error

    def rename(self) -> None:
        """Give the file its final name, durably, replacing what was there.

        Raises
        ------
        OutputError
            The disk refused.
        """
        with finishing(self.path):
            os.replace(self.part, self.path)
            self._published = True
            sync_folder(self.path.parent)

    def __enter__(self) -> OutputFile:
        try:
            self.open()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()


@contextlib.contextmanager
def finishing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses in the last steps of an output into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"could not be finished ({error.strerror})", path=path) from error


def write_all(fd: int, data: UInt8 | bytes | memoryview, offset: int) -> None:
    """Write all of a buffer at a position, of which one write may take only some; may raise OSError."""
    view = (data.data if isinstance(data, np.ndarray) else memoryview(data)).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def read_chunks(fd: int, offset: int, n_bytes: int) -> Iterator[memoryview]:
    """Read a piece of a file as far as it goes; each chunk is valid until the next."""
    view = memoryview(bytearray(CHUNK))
    end = offset + n_bytes
    while n_read := os.preadv(fd, [view[: end - offset]], offset):
        yield view[:n_read]
        offset += n_read


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(path: Path, raw: bytes, *, is_private: bool = False) -> None:
    """Write a small file whole, and replace a file of that name.

    Raises
    ------
    OutputError
        As of `OutputFile`.
    """
    with OutputFile(path, len(raw), is_private=is_private) as file:
        file.write(raw, 0)
        file.publish()
