"""What readers need of a file: exact reads, whether it changes, what the page cache has, what is no model."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from functools import cache
from pathlib import Path

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.types import FileState, UInt8

__all__ = ["IOV_MAX", "cached_share", "check_unchanged", "describe_foreign", "drop_bytes"]
__all__ += ["fill_buffers", "forget_range"]
__all__ += ["read_bounded", "read_state", "read_text", "real_path"]
__all__ += ["refuse_device", "was_cached"]

IOV_MAX = os.sysconf("SC_IOV_MAX")
SAMPLE = 1 << 20  # bytes of a file whose pages are asked for at once
N_SAMPLES = 64

_PICKLE = "is a Python pickle, which is never read; export safetensors or GGUF instead"
_FOREIGN = (
    (b"version https://git-lfs", "is a git-LFS pointer, not the file itself; run git lfs pull"),
    (b"PK\x03\x04", "is a PyTorch zip; pickle is never read, export safetensors or GGUF instead"),
    *((bytes([0x80, protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"<!doctype", "is a web page, not a model; the download went wrong, get it again"),
    (b"<html", "is a web page, not a model; the download went wrong, get it again"),
)


def describe_foreign(
    head: bytes, wanted: str, remedy: str = "give a GGUF file or a model directory"
) -> str:
    """Say what a file is that does not begin as a `wanted` file does, and what to do."""
    if not head:
        return f"is empty, not a {wanted} file; get it again"
    lowered = head.lstrip().lower()
    for magic, sentence in _FOREIGN:
        if head.startswith(magic) or lowered.startswith(magic):
            return sentence
    return f"is not a {wanted} file (it begins with {head[:8]!r}); {remedy}"


def real_path(path: Path) -> Path:
    """Return a path without links. `Path.resolve` raises for a link that leads to itself; this does not."""
    return Path(os.path.realpath(path))


def refuse_device(path: Path) -> None:
    """Refuse a pipe, a socket or a device where a file is read more than once.

    Raises
    ------
    FormatError
        It is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FormatError("is no regular file; save what it gives to one first", path=path)


def read_text(path: Path, max_bytes: int) -> str:
    """Read a short text in UTF-8 from a file, a pipe or a device.

    Raises
    ------
    FormatError
        It has more than `max_bytes`, or is not UTF-8.
    OSError
        It cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise FormatError(f"has more than {max_bytes >> 10} KiB; give the right file", path=path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 text ({error.reason})", path=path) from error


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a whole file that should be small.

    Raises
    ------
    FormatError
        It cannot be read, or has more than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            # `read` sets aside as much memory as it is asked for, whatever the file has.
            raw = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
    except OSError as e:
        raise FormatError(f"cannot be read ({e.strerror}); get the file again", path=path) from e
    if len(raw) > max_bytes:
        raise FormatError(
            f"is larger than {max_bytes / 1e6:g} MB, which no such file is; get it again",
            path=path,
        )
    return raw


def fill_buffers(
    fd: int, buffers: list[memoryview], offset: int, path: Path, tensor: str | None
) -> None:
    """Fill buffers one after the other from a file position; thread-safe.

    Raises
    ------
    FormatError
        The file ends before they are full, or the device fails.
    """
    while buffers:
        try:
            n_read = os.preadv(fd, buffers[:IOV_MAX], offset)
        except OSError as e:
            raise FormatError(
                f"could not be read ({e.strerror}); see to the disk and start again",
                path=path,
                tensor=tensor,
            ) from e
        if n_read == 0 and any(map(len, buffers)):
            raise FormatError(
                "the file ended while it was read; it changed under the merge, start again",
                path=path,
                tensor=tensor,
            )
        offset += n_read
        buffers = drop_bytes(buffers, n_read)


def drop_bytes(buffers: list[memoryview], n_bytes: int) -> list[memoryview]:
    """Return what is left of buffers without their first bytes, and without empty ones before these."""
    n_full = 0
    while n_full < len(buffers) and n_bytes >= len(buffers[n_full]):
        n_bytes -= len(buffers[n_full])
        n_full += 1
    left = buffers[n_full:]
    if n_bytes:
        left[0] = left[0][n_bytes:]
    return left


def read_state(fd: int, path: Path) -> FileState:
    """Note what an open file is now, for `check_unchanged`."""
    status = os.fstat(fd)
    return FileState(path, status.st_ino, status.st_size, status.st_mtime_ns)


def check_unchanged(fd: int, state: FileState) -> None:
    """Refuse a file that was written to since its state was noted.

    A file that was replaced under its name is no matter: what is open is still the old one.

    Raises
    ------
    FormatError
        Its size or time is another.
    """
    if read_state(fd, state.path) != state:
        raise FormatError(
            "was changed while it was read; let nothing write to it and start again",
            path=state.path,
        )


def forget_range(fd: int, offset: int, n_bytes: int) -> None:
    """Give the pages of a byte range back, so that one pass over a model leaves the page cache alone."""
    if n_bytes == 0:  # which would mean the rest of the file
        return
    with contextlib.suppress(OSError):  # a hint; some file systems do not know it
        os.posix_fadvise(fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)


def was_cached(fd: int) -> bool:
    """Tell whether nearly all of a file is in the page cache: then who put it there may want it again.

    False where the system does not tell, as of other users' files that may not be written.
    """
    user = os.geteuid()  # root may be one of a container, whom Linux tells no more than others
    is_told = (user != 0 and os.fstat(fd).st_uid == user) or os.access(
        f"/proc/self/fd/{fd}", os.W_OK
    )
    try:
        return is_told and cached_share(fd) > 0.9
    except OSError:
        return False


def cached_share(fd: int) -> float:
    """Return the share of a file's pages that are in the page cache (mincore(2)); 0 of an empty file.

    From 128 MiB on, 64 to 127 samples of 1 MiB are looked at. Of a file that belongs to another user and may
    not be written, Linux says that all of it is there.

    Raises
    ------
    OSError
        The file cannot be mapped, or the system does not say.
    """
    size = os.fstat(fd).st_size
    step = max(SAMPLE, size // N_SAMPLES // SAMPLE * SAMPLE)
    n_pages = n_cached = 0
    for offset in range(0, size, step):
        n_bytes = min(SAMPLE, size - offset)
        pages = np.empty(-(-n_bytes // mmap.PAGESIZE), np.uint8)
        try:
            mapping = mmap.mmap(fd, n_bytes, prot=mmap.PROT_READ, offset=offset)
        except ValueError as error:  # it became shorter
            raise OSError(errno.EINVAL, str(error)) from error
        with mapping:
            _look_up(mapping, pages)
        n_pages += pages.size
        n_cached += int(np.count_nonzero(pages & 1))
    return n_cached / max(1, n_pages)


def _look_up(mapping: mmap.mmap, pages_u8: UInt8) -> None:
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    size, pages = ctypes.c_size_t(len(mapping)), ctypes.c_void_p(pages_u8.ctypes.data)
    if _libc().mincore(ctypes.c_void_p(address), size, pages) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
