"""The journal of an output: which tensors are finished, on disk, so that an interrupted merge can go on.

The journal lies beside the part of the output's first file. A line is a CRC-32 and the text it is of::

    5e0c1a2b edgemerge-journal 1 WORK INPUTS       hashes of all that decides the bytes
    0b21f7c4 tensor 17 OUTPUT INPUT ...            a finished tensor, by number, with its checksums
    c51f0a93 files INODE BYTES MTIME_NS ...        the finished files, just before they are named

A line is written only when the bytes of its tensor are on the medium, not only in the page cache. Waiting
for the medium takes long, above all on flash. So a thread of its own writes lines in batches. A power cut
loses one batch and what was being written. A later run reads every tensor again and compares its checksum
(`edgemerge.output.resume`).
"""

from __future__ import annotations

import os
import stat
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from edgemerge.errors import FormatError, OutputError
from edgemerge.output.checksums import TensorResult
from edgemerge.output.file import sync_folder, write_all
from edgemerge.types import FileState

__all__ = [
    "Entries",
    "FileMark",
    "Fingerprint",
    "Journal",
    "journal_path",
    "mark_file",
    "read_journal",
]

MAGIC = "edgemerge-journal 1"
BATCH_BYTES = 16 << 20  # of finished tensors; a stop waits until as much is written
BATCH_SECONDS = 3.0
MAX_BYTES = 64 << 20  # of a journal: a million tensors
FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

FileMark: TypeAlias = tuple[int, int, int]  # inode, bytes, mtime in ns


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Hashes of all that decides an output's bytes. Budget, threads and block size do not decide them."""

    work: str  # recipe, version, layout
    inputs: str  # the models' files


@dataclass(frozen=True, slots=True)
class Entries:
    """What a journal says."""

    fingerprint: Fingerprint
    results: dict[int, TensorResult] = field(default_factory=dict)  # by number of the tensor
    files: tuple[FileMark, ...] = ()  # of finished files; empty before all are finished
    n_bytes: int = 0  # of the lines that are whole


def journal_path(output: Path) -> Path:
    """Name the journal of an output, of a split one by its first file."""
    return output.with_name(output.name + ".part.journal")


def mark_file(state: FileState) -> FileMark:
    """Return what identifies a file under any name and mount point."""
    return state.inode, state.n_bytes, state.mtime_ns


# -- reading -----------------------------------------------------------------------------------------


def read_journal(path: Path) -> Entries | None:
    """Read a journal. Return None where there is none, or where not even its first line is complete.

    A last line that is torn is what a power cut leaves, and does not count.

    Raises
    ------
    FormatError
        The file cannot be read, or is damaged before its end.
    """
    try:
        raw = _read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror}); delete it", path=path) from error
    lines = raw.splitlines(keepends=True)
    texts = [_parse_line(line) for line in lines]
    n_whole = texts.index(None) if None in texts else len(texts)
    if any(text is not None for text in texts[n_whole:]):
        raise FormatError("is damaged", path=path)
    if n_whole == 0:
        return None
    try:
        return _parse(texts[:n_whole], sum(map(len, lines[:n_whole])))
    except ValueError:
        raise FormatError("is no journal of this version", path=path) from None


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | FLAGS)
    with open(fd, "rb") as file:
        return file.read(min(MAX_BYTES, os.fstat(fd).st_size))


def _parse_line(line: bytes) -> str | None:
    """Return the text of a line; None where it is incomplete or damaged."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    is_whole = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text)
    return text.decode("ascii", errors="replace") if is_whole else None


def _parse(texts: Sequence[str | None], n_bytes: int) -> Entries:
    head, *others = [(text or "").split() for text in texts]
    if " ".join(head[:-2]) != MAGIC:
        raise ValueError
    results: dict[int, TensorResult] = {}
    files: tuple[FileMark, ...] = ()
    for kind, *words in others:
        numbers = [int(word) for word in words]
        if kind == "tensor" and len(numbers) > 1:
            results[numbers[0]] = TensorResult(tuple(numbers[2:]), numbers[1])
        elif kind == "files" and len(numbers) % 3 == 0:
            files = tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
        else:
            raise ValueError
    return Entries(Fingerprint(*head[-2:]), results, files, n_bytes)


# -- writing -----------------------------------------------------------------------------------------


def _open_to_write(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | FLAGS, 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OutputError("is no regular file; remove it", path=path)
    return fd


class Journal:
    """The journal of a running merge. Any thread may call its methods.

    Parameters
    ----------
    path : Path
        From `journal_path`. The caller must have the lock of the part.
    fingerprint : Fingerprint
        Of the output.
    earlier : Entries or None
        What the file holds already; None to start it anew.
    sync : callable
        Waits until all that was written to the output is on the medium.

    Raises
    ------
    OutputError
        The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Fingerprint,
        earlier: Entries | None,
        sync: Callable[[], None],
    ) -> None:
        self.path = path
        self.finished = set(earlier.results) if earlier is not None else set()
        self._sync = sync
        self._syncing: list[str] = []  # lines whose tensors are being written to the medium
        self._waiting: list[str] = []  # lines after these
        self._n_waiting = 0  # bytes of the tensors of these lines
        self._changed = threading.Condition()
        self._is_ending = False
        self._error: OutputError | None = None
        self._is_named = False  # whether the folder's entries for it and the parts are durable
        self._thread = threading.Thread(target=self._keep, name="edgemerge-journal", daemon=True)
        self._end = earlier.n_bytes if earlier is not None else 0
        self._fd = -1
        try:
            self._fd = _open_to_write(path)
            os.ftruncate(self._fd, self._end)
            if earlier is None:
                self._write([f"{MAGIC} {fingerprint.work} {fingerprint.inputs}"])
            self._thread.start()
        except BaseException as error:
            self._give_up(is_new=earlier is None)
            if isinstance(error, OSError):
                raise self._refusal(error) from error
            raise

    def _give_up(self, *, is_new: bool) -> None:
        """Close the file, and remove it where it is new."""
        if self._fd >= 0:
            os.close(self._fd)
            if is_new:
                self.path.unlink()

    def add(self, number: int, result: TensorResult, n_bytes: int) -> None:
        """Note a finished tensor of so many bytes. Does not wait for the disk.

        Raises
        ------
        OutputError
            An earlier batch could not be written.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            checksums = " ".join(map(str, (result.output, *result.inputs)))
            self._waiting.append(f"tensor {number} {checksums}")
            self._n_waiting += n_bytes
            self.finished.add(number)
            self._changed.notify()

    def complete(self, files: Sequence[FileMark]) -> None:
        """Make all tensors durable, and the marks of the finished files.

        Raises
        ------
        OutputError
            The disk refused.
        """
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        self._thread.join()
        if self._error is None:
            numbers = " ".join(str(number) for mark in files for number in mark)
            self._waiting.append(f"files {numbers}")
            self._commit()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write the lines of all finished tensors, without waiting for the disk.

        Checksums show later which tensors the disk lost. After a failure of the disk no line is written:
        the page cache may still show what the disk refused.
        """
        with self._changed:
            self._is_ending = True
            self._changed.notify()
            if self._fd < 0:
                return
            with suppress(OSError):
                if self._error is None:
                    self._write([*self._syncing, *self._waiting])
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Remove the file, as nothing is left to resume."""
        self.close()
        with suppress(OSError):
            self.path.unlink()

    # -- the thread ----------------------------------------------------------------------------------

    def _keep(self) -> None:
        while self._error is None:
            with self._changed:
                self._changed.wait_for(self._is_due, BATCH_SECONDS)
                if self._is_ending:
                    return
            if self._waiting:
                self._commit()

    def _is_due(self) -> bool:
        return self._is_ending or self._n_waiting >= BATCH_BYTES

    def _commit(self) -> None:
        """Wait until the tensors are on the medium, then write their lines, and wait for these."""
        with self._changed:
            self._syncing, self._waiting, self._n_waiting = self._waiting, [], 0
        try:
            self._sync()
            with self._changed:
                if self._fd < 0:  # closed meanwhile
                    return
                self._write(self._syncing)
                self._syncing = []
            os.fdatasync(self._fd)
            if not self._is_named:
                sync_folder(self.path.parent)
                self._is_named = True
        except OutputError as error:
            self._error = error
        except OSError as error:
            self._error = self._refusal(error)

    def _write(self, texts: Sequence[str]) -> None:
        raw = b"".join(b"%08x %s\n" % (zlib.crc32(t), t) for t in map(str.encode, texts))
        write_all(self._fd, raw, self._end)
        self._end += len(raw)

    def _refusal(self, error: OSError) -> OutputError:
        return OutputError(f"could not be written ({error.strerror})", path=self.path)
