"""The files of one output: usually one, several of a split model; all named at the end, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from edgemerge.errors import OutputError
from edgemerge.output import OutputFile
from edgemerge.report import FileReport

__all__ = ["OutputParts"]


class OutputParts:
    """Output files, each under a part's name until all are published.

    Used as a context manager, as `OutputFile` is.

    Parameters
    ----------
    sizes : sequence of (path, bytes)
        Final names and sizes, in order.

    Raises
    ------
    OutputError
        A file cannot be made; see `OutputFile`.
    """

    def __init__(self, sizes: Sequence[tuple[Path, int]]) -> None:
        with ExitStack() as stack:
            self.files = [stack.enter_context(OutputFile(path, size)) for path, size in sizes]
            self._stack = stack.pop_all()

    def hash(self) -> tuple[str, tuple[FileReport, ...]]:
        """Hash what stands on disk: the files one after the other, and each by itself."""
        together = hashlib.sha256()
        reports = []
        for file in self.files:
            alone = hashlib.sha256()
            for chunk in file.chunks():
                together.update(chunk)
                alone.update(chunk)
            reports.append(FileReport(file.path, file.n_bytes, alone.hexdigest()))
        return together.hexdigest(), tuple(reports)

    def publish(self) -> None:
        """Make all files durable, then give them their names, replacing what was there.

        The first file is what a model is loaded by: it goes before the others come, and comes last,
        so that old and new files never make a model together, even after a power cut.

        Raises
        ------
        OutputError
            The disk refused.
        """
        for file in self.files:
            file.sync()
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

    def __enter__(self) -> OutputParts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
