"""Results on disk: a journal while questions are scored, one JSON file when all are.

The journal is `RESULTS.json.journal`: a line that says what is being scored (the header), then a line
per question. It is written to after every batch, so a stop costs the batch in flight. It is taken
up again only if its header is the same to the letter. Results under another header are dropped by
force only; where a line is damaged, the work starts anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from edgemerge.errors import OutputError
from edgemerge.formats.files import refuse_device
from edgemerge.output.file import check_arrival, write_file
from edgemerge.runtime.closing import Closing
from edgemerge.runtime.model_files import check_adapter, model_files

__all__ = ["Results", "ResultsFile", "identify", "identify_adapter", "sha256_of"]


def identify(model: Path) -> dict[str, Any]:
    """Tell a model from another one without reading all of it.

    Parameters
    ----------
    model : Path
        A GGUF file; of a split model, the first part.

    Raises
    ------
    RuntimeFailure
        It is a folder, or a part of it is missing.

    Returns
    -------
    dict
        Its path; size in bytes, time of change (ns) and SHA-256 of each file.
    """
    return _identify(model, model_files(model))


def identify_adapter(adapter: Path, model: Path) -> dict[str, Any]:
    """Tell a LoRA adapter from another one, as `identify` a model.

    Parameters
    ----------
    adapter : Path
        A GGUF file.
    model : Path
        What it is to be added to.

    Raises
    ------
    RuntimeFailure, FormatError
        As of `edgemerge.runtime.model_files.check_adapter`.
    """
    check_adapter(adapter, model)
    return _identify(adapter, [adapter])


def _identify(model: Path, paths: Sequence[Path]) -> dict[str, Any]:
    files = []
    for path in paths:
        stat = path.stat()
        digest = sha256_of(path)
        files.append({"bytes": stat.st_size, "changed_ns": stat.st_mtime_ns, "sha256": digest})
    return {"path": str(model.resolve()), "files": files}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; a pipe or a device, which could be read only once, is refused (FormatError)."""
    refuse_device(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Results(Closing):
    """What has been scored so far, in memory; use it in a `with` statement.

    Attributes
    ----------
    entries : dict of (str, dict of (int, object))
        By job, then by index; all that JSON can say.
    """

    def __init__(self) -> None:
        self.entries: dict[str, dict[int, Any]] = {}

    def add(self, job: str, index: int, value: object) -> None:
        """Note a result.

        Parameters
        ----------
        job, index : str, int
            What it is the result of.
        value : object
            The result, as JSON.
        """
        self.entries.setdefault(job, {})[index] = value

    def flush(self) -> None:
        """Write to the disk what was noted; what is only in memory stays there."""

    def publish(self, document: Mapping[str, Any], check: Callable[[], None] | None = None) -> None:
        """Write the final file, where there is to be one.

        Parameters
        ----------
        document : mapping
            What to write, as JSON.
        check : callable, optional
            Raises OutputError where a file must not be replaced: one may have come meanwhile.
        """

    def close(self) -> None:
        """Close what is open."""


class ResultsFile(Results):
    """What has been scored so far, on disk; use it in a `with` statement.

    Parameters
    ----------
    output : Path
        The final file; the journal lies beside it.
    header : mapping
        All that the results depend on, as JSON.
    force : bool
        Whether results of an unfinished run with another header may be dropped.

    Attributes
    ----------
    path : Path
        The journal.
    n_resumed : int
        Entries that were there already.
    note : str
        Why an earlier journal was not taken up; else empty.

    Raises
    ------
    OutputError
        The journal cannot be written, another process is writing it, or it has results of another run.
    """

    def __init__(self, output: Path, header: Mapping[str, Any], *, force: bool = False) -> None:
        super().__init__()
        self.output = output
        self.path = output.with_name(output.name + ".journal")
        self.note = ""
        self._file = self._open()
        try:
            self._resume(json.loads(json.dumps(header)), force=force)
        except BaseException:
            self._file.close()
            raise
        self.n_resumed = sum(map(len, self.entries.values()))

    def _open(self) -> IO[bytes]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            file = os.fdopen(os.open(self.path, flags, 0o644), "r+b")
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", path=self.path) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise OutputError(
                "another evaluation is writing it; wait for that one", path=self.output
            ) from error
        if os.fstat(file.fileno()).st_nlink == 0:  # the run that had the lock has just published
            file.close()
            return self._open()
        return file

    def _resume(self, header: dict[str, Any], *, force: bool) -> None:
        """Take up what is there, up to the last whole line; begin anew if it is not ours."""
        lines = self._file.read().split(b"\n")
        end = sum(len(line) + 1 for line in lines[:-1])  # a stop may have torn the last line
        if len(lines) > 1:
            try:
                found, *entries = map(json.loads, lines[:-1])
                if found == header:
                    for job, index, value in entries:
                        self.entries.setdefault(job, {})[index] = value
                else:
                    other = _difference(found, header)
                    if entries and not force:
                        count = f"{len(entries)} result{'s' * (len(entries) > 1)}"
                        raise OutputError(
                            f"holds {count} of an unfinished run with {other}: finish "
                            "it with its own command, choose another -o, or drop them with --force",
                            path=self.path,
                        )
                    self.note = f"an earlier run had {other}: starting anew"
            except (ValueError, TypeError, AttributeError):
                self.note = "it is damaged: starting anew"
        if len(lines) == 1 or self.note:
            self.entries = {}
            end = 0
        self._file.truncate(end)
        self._file.seek(end)
        if end == 0:
            self._write(header)
            self.flush()

    def add(self, job: str, index: int, value: object) -> None:
        """Note a result; `flush` brings it to disk."""
        super().add(job, index, value)
        self._write([job, index, value])

    def _write(self, document: object) -> None:
        try:
            self._file.write(json.dumps(document, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise self._failure(error) from error

    def flush(self) -> None:
        """Hand all lines to the system: from here on they outlive this process.

        Raises
        ------
        OutputError
            The disk refused.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"could not be written ({error.strerror})", path=self.path)

    def publish(self, document: Mapping[str, Any], check: Callable[[], None] | None = None) -> None:
        """Write the final file, durable and at once, and remove the journal.

        Raises
        ------
        OutputError
            The disk refused, or `check` did; then the journal stays.
        """
        if check is not None:
            said = f"it came during the work: move it away, and the same command goes on with {self.path}"
            check_arrival(check, said)
        write_file(self.output, f"{json.dumps(document, indent=1, allow_nan=False)}\n".encode())
        try:
            self.path.unlink()
        except OSError as error:
            raise OutputError(f"could not be removed ({error.strerror})", path=self.path) from error

    def close(self) -> None:
        """Close the journal; it stays on disk unless it was published."""
        self._file.close()


def _difference(found: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    keys = [key for key in header if found.get(key) != header[key]]
    return f"other {' and '.join(keys) or 'fields'}"
