"""The files of one output: one, or several of a split model. All get their names at the end, or none.

A journal lies beside them. After an interrupt or a failure of the disk, parts and journal stay, and the next
run goes on with them. After an error that a second run would meet again, nothing stays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from edgemerge.errors import ClusterError, EdgemergeError, FormatError, OutputError
from edgemerge.formats.files import read_state
from edgemerge.output.checksums import TensorResult
from edgemerge.output.file import OutputFile, check_arrival, read_chunks
from edgemerge.output.journal import (
    Entries,
    FileMark,
    Fingerprint,
    Journal,
    journal_path,
    mark_file,
    read_journal,
)
from edgemerge.output.report import FileReport
from edgemerge.types import Progress

__all__ = ["OutputParts", "find_named", "hash_named", "is_begun"]


class OutputParts:
    """Output files, each under a part's name until all are published.

    Use it as a context manager. Or push it on an ExitStack before `open`, so that an interrupt at any moment
    removes the files.

    Parameters
    ----------
    sizes : sequence of (path, bytes)
        Final names and sizes, in order.
    fingerprint : Fingerprint
        Of all that decides the bytes. What an earlier run with another fingerprint left is dropped.
    output : Path, optional
        The folder that they will be in, where they are made in another (`edgemerge.output.folder`). Then
        the journal lies beside that.

    Attributes
    ----------
    files : list of OutputFile
        In order.
    journal : Journal or None
        Of the tensors that are finished; None until all is open.
    earlier : Entries or None
        What an earlier run finished, by its own account; None: this is a new start.
    notes : tuple of str
        Why it is a new start although an earlier run left something.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[Path, int]],
        fingerprint: Fingerprint,
        output: Path | None = None,
    ) -> None:
        self._journal_path = journal_path(output or sizes[0][0])
        self._remains = output and sizes[0][0].parent
        keeps = self._journal_path.is_file()
        self.earlier: Entries | None = None
        self.notes: tuple[str, ...] = ()
        self.files = [OutputFile(final, n_bytes, keeps=keeps) for final, n_bytes in sizes]
        self.journal: Journal | None = None
        self._fingerprint = fingerprint

    def open(self) -> None:
        """Make the files. Call `__exit__` afterwards, also when this fails.

        Raises
        ------
        OutputError
            A file cannot be made; see `OutputFile`.
        """
        first, *others = self.files
        path = self._journal_path
        first.open()
        if first.keeps:  # the lock of the part protects the journal too
            self._read_earlier(path, self._fingerprint)
            self._take_back([file.path for file in self.files])
        for file in others:
            file.open()
        if first.keeps:
            self._reserve(path)
        self.journal = Journal(path, self._fingerprint, self.earlier, self._sync_data)

    def _read_earlier(self, path: Path, fingerprint: Fingerprint) -> None:
        """Read what an earlier run of the same merge finished, or note why nothing is taken over."""
        try:
            earlier = read_journal(path)
        except FormatError as error:
            self.notes = (f"the merge starts anew: {error}",)
            return
        if earlier is None:
            return
        if earlier.fingerprint == fingerprint:
            self.earlier = earlier
        elif earlier.results:
            what = (
                "the models"
                if earlier.fingerprint.work == fingerprint.work
                else "the recipe or the version"
            )
            self.notes = (f"the merge starts anew: {what} changed since it was interrupted",)

    def _take_back(self, finals: Sequence[Path]) -> None:
        """Make parts again of files that an earlier run had named before a power cut."""
        marks = self.earlier.files if self.earlier is not None else ()
        if len(marks) != len(finals) or _is_marked(finals[0], marks[0]):
            return
        for final, mark in zip(finals[1:], marks[1:], strict=True):
            if _is_marked(final, mark):
                os.replace(final, final.with_name(final.name + ".part"))

    def _reserve(self, journal: Path) -> None:
        if self.earlier is None:
            journal.unlink()  # before the parts, which it lists
        for file in self.files:
            file.keeps = self.earlier is not None
            file.reserve()

    def note(self, number: int, result: TensorResult, n_bytes: int) -> None:
        """Note a finished tensor, as `Journal.add` does."""
        assert self.journal is not None
        self.journal.add(number, result, n_bytes)

    def _sync_data(self) -> None:
        for file in self.files:
            file.sync_data()

    def hash(self, progress: Progress | None = None) -> tuple[str, tuple[FileReport, ...]]:
        """Hash the files as they are on disk: all one after the other, and each by itself.

        `progress` is called with bytes done and bytes in all.
        """
        return _hash(((file.path, file.n_bytes, file.chunks()) for file in self.files), progress)

    def publish(
        self,
        check: Callable[[], None] | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Make all files durable, then give them their names, replacing files of these names.

        `check` raises OutputError where such a file must not be replaced: it may have come during the work.
        `then` is called when all have their names, before the journal that says so is removed.

        A model is loaded by its first file. So the old first file is removed first, and the new one is named
        last. Old and new files never form a model together, even after a power cut.

        Raises
        ------
        OutputError
            The disk refused, or `check` did.
        """
        assert self.journal is not None
        for file in self.files:
            file.sync()
        self.journal.complete([mark_file(file.state()) for file in self.files])
        if check is not None:
            check_arrival(check, "it came during the merge: move it away")
        first, *others = self.files
        if others:
            try:
                first.path.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(
                    f"could not be replaced ({error.strerror})", path=first.path
                ) from error
        for file in (*others, first):
            file.rename()
        if then is not None:
            then()
        self.journal.remove()

    def __enter__(self) -> OutputParts:
        try:
            self.open()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:
            for file in self.files:
                stack.push(file)
            if self.journal is not None:
                self._end(self.journal, error)
            elif (
                self.files[0].is_ours and not self.files[0].keeps
            ):  # a new start that was interrupted
                journal = self._journal_path
                if journal.is_file() and not journal.is_symlink():
                    journal.unlink()

    def _end(self, journal: Journal, error: BaseException | None) -> None:
        """Keep or remove the parts and the journal of an unfinished output."""
        n_finished = len(journal.finished)
        stays = error is not None and n_finished > 0 and _may_go_on(error)
        for file in self.files:
            file.keeps = stays
        if error is not None and stays:
            journal.close()
            error.add_note(
                f"run the same command again to go on after the {n_finished} tensors that are "
                f"finished, or delete {self._remains or self.files[0].part}"
            )
        else:
            journal.remove()


def is_begun(output: Path) -> bool:
    """Tell whether an interrupted run left a journal of an output, given by its first file."""
    return journal_path(output).is_file()


def find_named(finals: Sequence[Path], fingerprint: Fingerprint, journal: Path) -> set[Path]:
    """Find the files that an interrupted run had named already, by inode and time.

    Where these are all files, that run had finished its output.
    """
    try:
        earlier = read_journal(journal)
    except FormatError:
        return set()
    if earlier is None or earlier.fingerprint != fingerprint or len(earlier.files) != len(finals):
        return set()
    marks = zip(finals, earlier.files, strict=True)
    return {final for final, mark in marks if _is_marked(final, mark)}


def hash_named(
    finals: Sequence[Path], journal: Path, progress: Progress | None = None
) -> tuple[str, tuple[FileReport, ...]]:
    """Hash finished files, as `OutputParts.hash` does, and remove their journal."""
    with ExitStack() as stack:
        fds = [stack.enter_context(final.open("rb")).fileno() for final in finals]
        sizes = [os.fstat(fd).st_size for fd in fds]
        chunks = [read_chunks(fd, 0, size) for fd, size in zip(fds, sizes, strict=True)]
        hashes = _hash(zip(finals, sizes, chunks, strict=True), progress)
    journal.unlink(missing_ok=True)
    return hashes


def _hash(
    files: Iterable[tuple[Path, int, Iterable[memoryview]]], progress: Progress | None
) -> tuple[str, tuple[FileReport, ...]]:
    together = hashlib.sha256()
    reports: list[FileReport] = []
    files = list(files)
    done, total = 0, sum(n_bytes for _, n_bytes, _ in files)
    for path, n_bytes, chunks in files:
        alone = hashlib.sha256() if len(files) > 1 else together  # a gigabyte takes half a second
        for chunk in chunks:
            alone.update(chunk)
            if alone is not together:
                together.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        reports.append(FileReport(path, n_bytes, alone.hexdigest()))
    return together.hexdigest(), tuple(reports)


def _is_marked(path: Path, mark: FileMark) -> bool:
    """Tell whether a file is the one that a journal lists."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return mark_file(read_state(fd, path)) == mark
    finally:
        os.close(fd)


def _may_go_on(error: BaseException) -> bool:
    """Tell whether a second run may succeed: the first was stopped, or a disk or a cluster failed."""
    if isinstance(error, ClusterError):
        return True
    is_verdict = isinstance(error, EdgemergeError) and not isinstance(error, OutputError)
    return not is_verdict or isinstance(error.__cause__, OSError)
