"""Matrices of an adapter's file, read by rows as float32 in the order that GGUF has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.formats.adapters.forms import AS_STORED, Order
from edgemerge.formats.byte_file import open_file
from edgemerge.formats.gguf.types import row_bytes
from edgemerge.formats.hub.changes import Change
from edgemerge.formats.quants.codec import CODECS
from edgemerge.types import Float32, UInt8

__all__ = ["Factor", "FactorFile", "StoredMatrix"]

ROW_NUMBERS = 48  # bytes of the numbers by which a row's place is found


class FactorFile:
    """An open safetensors file, or config.json, of an adapter.

    Raises
    ------
    FormatError
        It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_file(path)
        except OSError as error:
            raise FormatError(
                f"cannot be opened ({error.strerror}); free it and start again", path=path
            ) from error
        self.state = self._file.state

    def matrix(self, name: str, dtype: str, shape: tuple[int, int], offset: int) -> StoredMatrix:
        """Describe a matrix that begins at a byte of the file."""
        run = offset, offset + shape[0] * row_bytes(dtype, shape[1])

        def read(start: int, out_u8: UInt8) -> None:
            self._file.fill([out_u8.data.cast("B")], offset + start, name, run)

        return StoredMatrix(name, dtype, shape, self.path, read)

    def check_unchanged(self) -> None:
        """Raise FormatError where the file was written to since it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix as it is stored; a vector is one of a single column."""

    name: str
    dtype: str  # ggml type name
    shape: tuple[int, int]
    path: Path
    fill: Callable[[int, UInt8], None]  # fills a buffer from a byte of the matrix on

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Float32:
        """Read a part of the matrix, both ranges half-open; whole rows of a quantised one."""
        n_rows, n_cols = rows[1] - rows[0], columns[1] - columns[0]
        width = row_bytes(self.dtype, self.shape[1])
        if n_cols == self.shape[1]:
            raw = np.empty(n_rows * width, np.uint8)
            self.fill(rows[0] * width, raw)
        else:
            size = width // self.shape[1]
            raw = np.empty(n_rows * n_cols * size, np.uint8)
            for i, part in enumerate(raw.reshape(n_rows, n_cols * size)):
                self.fill((rows[0] + i) * width + columns[0] * size, part)
        values = np.empty((n_rows, n_cols), np.float32)
        CODECS[self.dtype].decode(raw, values.reshape(-1))
        if not np.isfinite(values).all():
            raise FormatError(
                "holds NaN or infinity; the adapter is damaged, get it again",
                path=self.path,
                tensor=self.name,
            )
        return values


@dataclass(frozen=True, slots=True)
class Factor:
    """A matrix that is all or part of a stored one.

    Element (i, c) is the stored element (row + i, column + c * step), or transposed
    (row + c, column + i * step).

    Example: one of two experts' B, of rank 3, is every other column of a stored matrix of six: `column` is
    its number and `step` 2.
    """

    stored: StoredMatrix
    shape: tuple[int, int]
    row: int = 0
    column: int = 0
    step: int = 1
    transposed: bool = False
    order: Order = AS_STORED
    change: Change | None = None  # of the values, which makes them GGUF's

    def read(self, start: int, stop: int) -> Float32:
        """Return rows [start, stop), C-contiguous."""
        rows = self._ordered(start, stop)
        if self.change is not None:
            self.change.apply(rows, start)
        return rows

    def _ordered(self, start: int, stop: int) -> Float32:
        order = self.order
        if order.half:
            head = 2 * order.half
            first, last = start // head * head, min(-(-stop // head) * head, self.shape[0])
            rows: Float32 = self._read(first, last)[order.rows(start, stop) - first]
            return rows
        if order.starts:
            return self._read_pieces(start, stop)
        if order.step > 1:
            between = self._read(start * order.step, (stop - 1) * order.step + 1)
            return np.ascontiguousarray(between[:: order.step])
        return order.columns(self._read(start, stop))

    def _read_pieces(self, start: int, stop: int) -> Float32:
        """Read rows that lie in pieces, each by a call of its own."""
        out = np.empty((stop - start, self.shape[1]), np.float32)
        stored = self.order.rows(start, stop)
        begins = [0, *(np.flatnonzero(np.diff(stored) != 1) + 1), len(stored)]
        for begin, end in pairwise(begins):
            first = int(stored[begin])
            out[begin:end] = self._read(first, first + int(end - begin))
        return out

    def _read(self, start: int, stop: int) -> Float32:
        last = (stop - 1 if self.transposed else self.shape[1] - 1) * self.step + 1
        if self.transposed:
            rows = self.row, self.row + self.shape[1]
            columns = self.column + start * self.step, self.column + last
        else:
            rows = self.row + start, self.row + stop
            columns = self.column, self.column + last
        if self.step > 1:  # whole rows in one read, of which every other element is used
            part = self.stored.read(rows, (0, self.stored.shape[1]))
            part = part[:, columns[0] : columns[1] : self.step]
        else:
            part = self.stored.read(rows, columns)
        return np.ascontiguousarray(part.T if self.transposed else part)

    def nbytes(self, n_rows: int) -> int:
        """Bytes that reading so many rows takes at most, as stored, decoded and put in order."""
        if self.order.half:
            n_rows += 4 * self.order.half
        numbers = ROW_NUMBERS * n_rows if self.order.half or self.order.starts else 0
        cells = n_rows * self.order.step * self.shape[1] * self.step
        if self.transposed and self.step > 1:
            cells = self.shape[1] * self.stored.shape[1]
        return 12 * cells + numbers
