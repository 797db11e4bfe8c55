"""How the rows of one tensor lie in a file: one description, by which they are read and written.

The bytes are as stored. Each layout takes any rows of the GGUF tensor, in pieces, whatever the size of what
is stored. What becomes of the values is in `edgemerge.formats.hub.changes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import MismatchError
from edgemerge.formats.hub.changes import ITEMS
from edgemerge.formats.hub.rotary import rotary_runs
from edgemerge.types import TensorSpec, UInt8

__all__ = ["BLOCK", "Columns", "Groups", "Layout", "Packed", "Rotary", "Rows", "Start", "Written"]

Start: TypeAlias = tuple[Path, int]  # shard, offset in it
# Takes buffers one after the other from a place, or to it
Move: TypeAlias = Callable[[list[memoryview], Start], None]
Runs: TypeAlias = Iterator[tuple[Start, list[slice]]]  # a place, and what of a buffer lies there

PIECE = 1 << 18  # bytes that are read at a time; one row at least
SKIPPED = 24 << 10  # bytes of a row that are read with the wanted ones rather than call once more
BLOCK = 32  # weights that have an exponent in common in MXFP4
ITEMS_AT_ONCE = 1024  # pieces of rows that one system call reads or writes


class _Runs(ABC):
    """A layout in which each piece of a row is one run of bytes, so that no buffer is between."""

    @abstractmethod
    def runs(self, spec: TensorSpec, start: int, stop: int) -> Runs:
        """Yield where rows [start, stop) are; `spec` is the GGUF tensor in the type that is stored."""

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Move) -> None:
        """Fill `out_u8` with rows [start, stop) as GGUF has them; thread-safe."""
        self._move(spec, start, out_u8, fill)

    def write(self, spec: TensorSpec, start: int, raw_u8: UInt8, fill: Move, put: Move) -> None:
        """Write rows from `start` on, which are as GGUF has them; thread-safe."""
        self._move(spec, start, raw_u8, put)

    def _move(self, spec: TensorSpec, start: int, rows_u8: UInt8, move: Move) -> None:
        view = rows_u8.data.cast("B")
        stop = start + rows_u8.nbytes // spec.row_bytes
        for place, pieces in self.runs(spec, start, stop):
            move([view[piece] for piece in pieces], place)


@dataclass(frozen=True, slots=True)
class Rows(_Runs):
    """Rows as they are, in parts of equal size that follow one another. What is left is 0, and not stored."""

    parts: tuple[Start, ...]
    part_bytes: int

    def runs(self, spec: TensorSpec, start: int, stop: int) -> Runs:
        """See `_Runs`."""
        begin, end = start * spec.row_bytes, stop * spec.row_bytes
        end = min(end, len(self.parts) * self.part_bytes)
        at = begin
        while at < end:
            part, offset = divmod(at, self.part_bytes)
            last = min(end, (part + 1) * self.part_bytes)
            shard, first = self.parts[part]
            yield (shard, first + offset), [slice(at - begin, last - begin)]
            at = last

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Move) -> None:
        """See `_Runs`."""
        self._unstored(spec, start, out_u8)[:] = 0
        self._move(spec, start, out_u8, fill)

    def write(self, spec: TensorSpec, start: int, raw_u8: UInt8, fill: Move, put: Move) -> None:
        """See `_Runs`. Raises MismatchError where something else than 0 has no place."""
        if self._unstored(spec, start, raw_u8).any():
            raise MismatchError(
                "has values in rows that its directory does not have; write a GGUF instead",
                tensor=spec.name,
            )
        self._move(spec, start, raw_u8, put)

    def _unstored(self, spec: TensorSpec, start: int, rows_u8: UInt8) -> UInt8:
        """Return what of some rows is not stored."""
        return rows_u8[max(0, len(self.parts) * self.part_bytes - start * spec.row_bytes) :]

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """Yield what is not needed again after the first rows: where it begins, and its bytes."""
        left = n_rows * spec.row_bytes
        for start in self.parts:
            yield start, min(left, self.part_bytes)
            left = max(0, left - self.part_bytes)


@dataclass(frozen=True, slots=True)
class Rotary(_Runs):
    """Rows of q or k, or elements of their bias, in the order of GGUF's rotation."""

    start: Start
    head_length: int  # items of a head
    width: int  # bytes of an item: a row of a matrix, an element of a bias

    def runs(self, spec: TensorSpec, start: int, stop: int) -> Runs:
        """See `_Runs`: one run for the items of a head that are stored together."""
        shard, offset = self.start
        width, n_bytes = self.width, spec.row_bytes
        first, last = start * n_bytes // width, stop * n_bytes // width
        for at, places in rotary_runs(first, last, self.head_length):
            yield (shard, offset + at * width), [slice(i * width, (i + 1) * width) for i in places]

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `Rows`."""
        yield self.start, n_rows * spec.row_bytes


@dataclass(frozen=True, slots=True)
class Groups(_Runs):
    """Rows whose groups of columns, all of one width, GGUF has in other places.

    With `places` 0, 2, 1 the second stored group of three is GGUF's last.
    """

    start: Start
    places: tuple[int, ...]

    def runs(self, spec: TensorSpec, start: int, stop: int) -> Runs:
        """See `_Runs`."""
        row_bytes, n_bytes = spec.row_bytes, spec.row_bytes // len(self.places)
        starts = [place * n_bytes for place in self.places]
        shard, offset = self.start
        height = max(1, ITEMS_AT_ONCE // len(starts))
        for top in range(start, stop, height):
            rows = range(top - start, min(stop, top + height) - start)
            firsts = [row * row_bytes + to for row in rows for to in starts]
            yield (shard, offset + top * row_bytes), [slice(at, at + n_bytes) for at in firsts]

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `Rows`."""
        yield self.start, n_rows * spec.row_bytes


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows that are stored as columns of a stack of matrices, or as its biases.

    Of two matrices in one (in, 2 out), whose outputs come in turn, the second has `first` 1 and `step` 2.
    Its row 3 is column 7.
    """

    start: Start
    dtype: str
    height: int  # rows of a stored matrix: the inputs; 1: biases
    width: int  # its columns
    first: int
    step: int
    n_out: int  # columns of a matrix that are ours

    @property
    def is_mixed(self) -> bool:
        """Whether another tensor's columns lie between two of these."""
        return self.step > 1

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Move) -> None:
        """See `_Runs`."""
        out = out_u8.view(ITEMS[self.dtype]).reshape(-1, self.height)
        begin, end = self._columns(spec, start), self._columns(spec, stop)
        at = begin
        while at < end:
            matrix, column = divmod(at, self.n_out)
            n = min(end - at, self.n_out - column)
            self._read_strip(matrix, column, out[at - begin : at - begin + n], fill)
            at += n

    def write(self, spec: TensorSpec, start: int, raw_u8: UInt8, fill: Move, put: Move) -> None:
        """See `_Runs`: what lies between two columns is read and written again, so one thread at a time."""
        rows = raw_u8.view(ITEMS[self.dtype]).reshape(-1, self.height)
        begin = at = self._columns(spec, start)
        end = begin + len(rows)
        while at < end:
            matrix, column = divmod(at, self.n_out)
            n = min(end - at, self.n_out - column)
            self._write_strip(matrix, column, rows[at - begin : at - begin + n], fill, put)
            at += n

    def _columns(self, spec: TensorSpec, n_rows: int) -> int:
        return n_rows * spec.n_cols // self.height

    def _read_strip(self, matrix: int, column: int, out: NDArray[np.generic], fill: Move) -> None:
        """Read some columns of one matrix, in bands of its rows: whole, or each row by a call of its own."""
        left = self.first + self.step * column
        width = self.step * (len(out) - 1) + 1
        whole = (self.width - width) * out.itemsize <= SKIPPED
        skipped, width = (left, self.width) if whole else (0, width)
        shard, offset = self.start
        height = max(1, PIECE // (width * out.itemsize))
        for top in range(0, self.height, height):
            bottom = min(self.height, top + height)
            band = np.empty((bottom - top, width), out.dtype)
            first = (matrix * self.height + top) * self.width + left - skipped
            runs = band.reshape(1, -1) if whole else band
            for i, run in enumerate(runs):
                at = first + i * self.width
                fill([run.view(np.uint8).data.cast("B")], (shard, offset + at * out.itemsize))
            ours = band[:, skipped :: self.step][:, : len(out)]
            out[:, top:bottom] = ours.T

    def _write_strip(
        self, matrix: int, column: int, rows: NDArray[np.generic], fill: Move, put: Move
    ) -> None:
        """Write some columns of one matrix, in bands of its rows; whole rows by one call."""
        item, width = rows.itemsize, self.step * (len(rows) - 1) + 1
        left = self.first + self.step * column
        height = max(1, PIECE // (width * item))
        shard, offset = self.start
        for top in range(0, self.height, height):
            bottom = min(self.height, top + height)
            band = np.empty((bottom - top, width), rows.dtype)
            first = (matrix * self.height + top) * self.width + left
            runs = band.reshape(1, -1) if width == self.width else band
            places = [(shard, offset + (first + i * self.width) * item) for i in range(len(runs))]
            views = [[run.view(np.uint8).data.cast("B")] for run in runs]
            if self.is_mixed:
                for view, place in zip(views, places, strict=True):
                    fill(view, place)
            band[:, :: self.step] = rows[:, top:bottom].T
            for view, place in zip(views, places, strict=True):
                put(view, place)

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `Rows`: a matrix is needed until its last column is read."""
        n_matrices = self._columns(spec, n_rows) // self.n_out
        item = np.dtype(ITEMS[self.dtype]).itemsize
        yield self.start, n_matrices * self.height * self.width * item


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows in MXFP4, whose nibbles and exponents are stored apart, as gpt-oss has them.

    A block of 32 weights is 16 bytes and an exponent. Byte k has weights 2 k (its lower half) and 2 k + 1.
    In ggml's 17 bytes the exponent comes first, and byte k has weights k and k + 16: `repack_mxfp4` of
    llama.cpp's conversion/gpt_oss.py. No weight changes.
    """

    blocks: Start
    scales: Start
    first: int  # of the stored rows, the first that is ours
    step: int  # and how many lie between two of ours

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Move) -> None:
        """See `_Runs`."""
        n_blocks = spec.n_cols // BLOCK
        out = out_u8.reshape(-1, n_blocks, 1 + BLOCK // 2)
        height = max(1, PIECE // (self.step * n_blocks * BLOCK // 2))
        for begin in range(start, stop, height):
            end = min(stop, begin + height)
            piece = out[begin - start : end - start]
            piece[:, :, 0] = self._rows(self.scales, begin, end, n_blocks, 1, fill)[:, :, 0]
            stored = self._rows(self.blocks, begin, end, n_blocks, BLOCK // 2, fill)
            left, right = stored[:, :, : BLOCK // 4], stored[:, :, BLOCK // 4 :]
            piece[:, :, 1::2] = (left & 0x0F) | (right << 4)
            piece[:, :, 2::2] = (left >> 4) | (right & 0xF0)

    def _rows(
        self, place: Start, begin: int, end: int, n_blocks: int, width: int, fill: Move
    ) -> UInt8:
        """Read rows, (end - begin, n_blocks, width), and what lies between them."""
        n_stored = self.step * (end - begin - 1) + 1
        raw = np.empty((n_stored, n_blocks, width), np.uint8)
        shard, offset = place
        at = (self.first + self.step * begin) * n_blocks * width
        fill([raw.reshape(-1).data.cast("B")], (shard, offset + at))
        return raw[:: self.step]

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `_Runs`."""
        n_blocks = self.step * n_rows * spec.n_cols // BLOCK
        yield self.blocks, n_blocks * BLOCK // 2
        yield self.scales, n_blocks


Written: TypeAlias = Rows | Rotary | Groups | Columns
Layout: TypeAlias = Written | Packed  # which is only read
