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

__all__ = ["Bands", "Decay", "Groups", "Layout", "Scaled", "as_f32"]

Start: TypeAlias = tuple[Path, int]  # shard, offset in it
Fill: TypeAlias = Callable[[list[memoryview], Start], None]
# Rows up to a number, and what they are multiplied by, one factor after the other
Bands: TypeAlias = tuple[tuple[int, tuple[float, ...]], ...]

PIECE = 1 << 18  # bytes that are read at a time; one row at least
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
