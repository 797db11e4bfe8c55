"""Where one tensor of an output lies, and in which order its rows lie there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from isal.isal_zlib import crc32

from edgemerge.errors import OutputError
from edgemerge.formats.hub.layouts import Rows, Start, Written
from edgemerge.output.file import OutputFile
from edgemerge.types import TensorSpec, UInt8

__all__ = ["Places", "RowWriter", "TensorPlace", "place_in_order"]

PIECE = 1 << 20  # bytes that are read back at a time; one row at least


class RowWriter(Protocol):
    """Takes the rows of a tensor that are made."""

    def write_rows(self, start: int, raw_u8: UInt8) -> None:
        """Write encoded rows from `start` on, which are in GGUF's order; thread-safe."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """The bytes of one tensor in its file."""

    file: OutputFile
    spec: TensorSpec  # of the output
    layout: Written
    span: tuple[
        int, int
    ]  # of the file, without gaps: first byte and last + 1, its own or also others'
    # Held while rows are written, where other tensors' bytes are written again with them
    lock: AbstractContextManager[object] = field(default_factory=nullcontext)

    def write_rows(self, start: int, raw_u8: UInt8) -> None:
        """Write rows from `start` on, which are in GGUF's order; thread-safe.

        Raises
        ------
        OutputError
            The disk refused.
        MismatchError
            A directory of the family has no such rows.
        """
        try:
            with self.lock:
                self.layout.write(self.spec, start, raw_u8, self._fill, self._put)
        except OSError as error:
            path = self.file.path
            raise OutputError(f"could not be read back ({error.strerror})", path=path) from error

    def crc32(self) -> int:
        """Return the CRC-32 of the rows in GGUF's order, as they are on disk and not in a cache."""
        n_rows, row_bytes, checksum = self.spec.n_rows, self.spec.row_bytes, 0
        height = max(1, PIECE // row_bytes)
        rows_u8 = np.empty(height * row_bytes, np.uint8)
        self._forget()
        for start in range(0, n_rows, height):
            stop = min(n_rows, start + height)
            piece = rows_u8[: (stop - start) * row_bytes]
            self.layout.read(self.spec, start, stop, piece, self._fill)
            checksum = crc32(piece.data, checksum)
        self._forget()
        return checksum

    def _put(self, items: list[memoryview], place: Start) -> None:
        if len(items) == 1:
            self.file.write(items[0], place[1])
        else:
            self.file.write_items(items, place[1])

    def _fill(self, items: list[memoryview], place: Start) -> None:
        self.file.read_items(items, place[1])

    def _forget(self) -> None:
        for (_, offset), n_bytes in self.layout.stored(self.spec, self.spec.n_rows):
            self.file.forget(offset, n_bytes)


Places: TypeAlias = Mapping[str, TensorPlace]  # by GGUF name


def place_in_order(file: OutputFile, offset: int, spec: TensorSpec) -> TensorPlace:
    """Place a tensor whose rows stand in GGUF's order, from an offset on."""
    rows = Rows(((file.path, offset),), spec.nbytes)
    return TensorPlace(file, spec, rows, (offset, offset + spec.nbytes))
