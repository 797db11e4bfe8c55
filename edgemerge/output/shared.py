"""An output file that workers on other machines write too, where they see the file itself.

The client writes a token where the header will be. Who reads it there sees the same file. The header takes
its place at the end. From then on a worker that was thought lost cannot write any more.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from edgemerge.errors import Stopped
from edgemerge.output.file import OutputFile
from edgemerge.types import UInt8

__all__ = ["Mark", "SharedFile", "mark_files"]

TOKEN_BYTES = 16  # less than any header has


@dataclass(frozen=True, slots=True)
class Mark:
    """How a worker knows a file."""

    path: Path  # the final name
    n_bytes: int
    token: bytes


def mark_files(files: Collection[OutputFile]) -> dict[Path, Mark]:
    """Write a token into each file, and return the marks by the files' final names.

    Raises
    ------
    OutputError
        The disk refused.
    """
    marks = {}
    for file in files:
        mark = Mark(file.path, file.n_bytes, secrets.token_bytes(TOKEN_BYTES))
        file.write(mark.token, 0)
        file.sync_data()  # over a network, what others open next has it
        marks[file.path] = Mark(Path(os.path.abspath(file.path)), file.n_bytes, mark.token)
    return marks


class SharedFile(OutputFile):
    """The part of an output that another process made and has the lock of."""

    def __init__(self, mark: Mark) -> None:
        super().__init__(mark.path, mark.n_bytes, keeps=True)
        self._token = mark.token

    def attach(self) -> bool:
        """Open the file. Return whether it is there, is the same, and may be written to."""
        try:
            self._fd = os.open(self.part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        if not self._is_marked():
            self.detach()
            return False
        return True

    def detach(self) -> None:
        """Close the file."""
        self._close()

    def _is_marked(self) -> bool:
        return os.pread(self._fd, TOKEN_BYTES, 0) == self._token

    def _check(self) -> None:
        if not self._is_marked():
            raise Stopped

    def write(self, data: UInt8 | bytes | memoryview, offset: int) -> None:
        """Write as `OutputFile` does. Raises `Stopped` where the file is another's now."""
        self._check()
        super().write(data, offset)

    def write_items(self, items: list[memoryview], offset: int) -> None:
        """Write as `OutputFile` does. Raises `Stopped` where the file is another's now."""
        self._check()
        super().write_items(items, offset)
