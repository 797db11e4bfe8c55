"""Tensors whose stored bytes are not those that GGUF has: other values, another order, other blocks.

Each layout reads any rows of the GGUF tensor, in pieces, whatever the size of what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.types import Float32, TensorSpec, UInt8

__all__ = ["BLOCK", "Bands", "Columns", "Decay", "Groups", "Layout", "Packed", "Scaled", "as_f32"]

Start: TypeAlias = tuple[Path, int]  # shard, offset in it
Fill: TypeAlias = Callable[[list[memoryview], Start], None]
# Rows up to a number, and what they are multiplied by, one factor after the other
Bands: TypeAlias = tuple[tuple[int, tuple[float, ...]], ...]

PIECE = 1 << 18  # bytes that are read at a time; one row at least
SKIPPED = 24 << 10  # bytes of a row that are read with the wanted ones rather than call once more
BLOCK = 32  # weights that have an exponent in common in MXFP4
ITEMS_AT_ONCE = 1024  # pieces of rows that one system call reads
ITEMS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Layout(Protocol):
    """How the rows of one tensor are read."""

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Fill) -> None:
        """Fill `out_u8` with rows [start, stop) as GGUF has them; thread-safe."""
        ...

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """Yield what is not needed again after the first rows: where it begins, and its bytes."""
        ...


def as_f32(raw: UInt8, dtype: str) -> Float32:
    """Return stored values as float32; of F32 a view."""
    values = raw.view(ITEMS[dtype])
    if dtype == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4", copy=False)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rows that GGUF has multiplied by factors, as float32: the product is rounded after each factor."""

    start: Start
    dtype: str  # as stored
    bands: Bands

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Fill) -> None:
        """See `Layout`."""
        width = self._row_bytes(spec)
        out = out_u8.view("<f4").reshape(-1, spec.n_cols)
        shard, offset = self.start
        height = max(1, PIECE // width)
        for first in range(start, stop, height):
            last = min(stop, first + height)
            raw = np.empty((last - first) * width, np.uint8)
            fill([raw.data.cast("B")], (shard, offset + first * width))
            piece = out[first - start : last - start]
            piece[:] = as_f32(raw, self.dtype).reshape(piece.shape)
            self._multiply(piece, first)

    def _multiply(self, piece: NDArray[np.float32], first: int) -> None:
        begin = 0
        for end, factors in self.bands:
            rows = piece[max(0, begin - first) : max(0, end - first)]
            for factor in factors:
                rows *= np.float32(factor)
            begin = end

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `Layout`."""
        yield self.start, n_rows * self._row_bytes(spec)

    def _row_bytes(self, spec: TensorSpec) -> int:
        return spec.n_cols * np.dtype(ITEMS[self.dtype]).itemsize


@dataclass(frozen=True, slots=True)
class Decay:
    """The decay of a state space, -exp of what is stored: `Mamba2Model.modify_tensors` of mamba.py.

    There the exponential is torch's, here a float64 that is rounded, the same on all machines.
    """

    start: Start
    dtype: str
    order: tuple[int, ...] = ()  # of a vector: which stored element each one is; () as they are

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Fill) -> None:
        """See `Layout`."""
        item = np.dtype(ITEMS[self.dtype]).itemsize
        raw = np.empty((stop - start) * spec.n_cols * item, np.uint8)
        shard, offset = self.start
        fill([raw.data.cast("B")], (shard, offset + start * spec.n_cols * item))
        logs = as_f32(raw, self.dtype).astype(np.float64)
        with np.errstate(over="ignore"):  # infinity is refused where it is merged
            out_u8.view("<f4")[:] = -np.exp(logs[list(self.order)] if self.order else logs)

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `Layout`."""
        yield self.start, n_rows * spec.n_cols * np.dtype(ITEMS[self.dtype]).itemsize


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

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Fill) -> None:
        """See `Layout`."""
        out = out_u8.view(ITEMS[self.dtype]).reshape(-1, self.height)
        begin, end = self._columns(spec, start), self._columns(spec, stop)
        at = begin
        while at < end:
            matrix, column = divmod(at, self.n_out)
            n = min(end - at, self.n_out - column)
            self._read_strip(matrix, column, out[at - begin : at - begin + n], fill)
            at += n

    def _columns(self, spec: TensorSpec, n_rows: int) -> int:
        return n_rows * spec.n_cols // self.height

    def _read_strip(self, matrix: int, column: int, out: NDArray[np.generic], fill: Fill) -> None:
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

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `Layout`: a matrix is needed until its last column is read."""
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

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Fill) -> None:
        """See `Layout`."""
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
        self, place: Start, begin: int, end: int, n_blocks: int, width: int, fill: Fill
    ) -> UInt8:
        """Read rows, (end - begin, n_blocks, width), and what lies between them."""
        n_stored = self.step * (end - begin - 1) + 1
        raw = np.empty((n_stored, n_blocks, width), np.uint8)
        shard, offset = place
        at = (self.first + self.step * begin) * n_blocks * width
        fill([raw.reshape(-1).data.cast("B")], (shard, offset + at))
        return raw[:: self.step]

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `Layout`."""
        n_blocks = self.step * n_rows * spec.n_cols // BLOCK
        yield self.blocks, n_blocks * BLOCK // 2
        yield self.scales, n_blocks


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows whose groups of columns, all of one width, GGUF has in other places.

    With `places` 0, 2, 1 the second stored group of three is GGUF's last.
    """

    start: Start
    places: tuple[int, ...]

    def read(self, spec: TensorSpec, start: int, stop: int, out_u8: UInt8, fill: Fill) -> None:
        """See `Layout`: the bytes go where they belong at once, no buffer between."""
        n_bytes = spec.row_bytes // len(self.places)
        starts, view = [place * n_bytes for place in self.places], out_u8.data.cast("B")
        shard, offset = self.start
        height = max(1, ITEMS_AT_ONCE // len(starts))
        for top in range(start, stop, height):
            rows = range(top - start, min(stop, top + height) - start)
            items = [view[row * spec.row_bytes + to :][:n_bytes] for row in rows for to in starts]
            fill(items, (shard, offset + top * spec.row_bytes))

    def stored(self, spec: TensorSpec, n_rows: int) -> Iterator[tuple[Start, int]]:
        """See `Layout`."""
        yield self.start, n_rows * spec.row_bytes
