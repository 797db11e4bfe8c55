"""The numbers of a delta, read by rows of the base's tensor as float32: in ggml's blocks, or sparse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.types import block_size
from edgemerge.formats.quants.codec import CODECS
from edgemerge.native import KernelFile
from edgemerge.types import Float32, TensorSpec, UInt8

__all__ = ["GROUP", "CodedRows", "Fill", "SparseRows", "StoredValues"]

GROUP = 256  # elements, so that a place in it is a byte

Fill: TypeAlias = Callable[[int, UInt8], None]
"""Fills a buffer from a byte of a tensor on."""

deltas = KernelFile("deltas")


@dataclass(frozen=True, slots=True)
class StoredValues:
    """Numbers in blocks of a ggml type. The end of a row of the base's tensor ends no block."""

    spec: TensorSpec
    path: Path
    fill: Fill

    def read(self, start: int, stop: int) -> Float32:
        """Decode numbers [start, stop).

        Raises
        ------
        FormatError
            One is NaN or infinite.
        """
        length, size = block_size(self.spec.dtype)
        first, last = start // length, -(-stop // length)
        raw = np.empty((last - first) * size, np.uint8)
        self.fill(first * size, raw)
        values = np.empty((last - first) * length, np.float32)
        CODECS[self.spec.dtype].decode(raw, values)
        if not np.isfinite(values).all():
            raise FormatError(
                "holds NaN or infinity; the delta is damaged, get it again",
                path=self.path,
                tensor=self.spec.name,
            )
        return values[start - first * length : stop - first * length]

    def nbytes(self, n: int) -> int:
        """Bytes that reading so many takes at most."""
        length, size = block_size(self.spec.dtype)
        blocks = -(-n // length) + 1
        return blocks * (size + 5 * length)


@dataclass(frozen=True, slots=True)
class CodedRows:
    """A whole change, in blocks of a ggml type."""

    values: StoredValues
    shape: tuple[int, int]  # of the base's tensor; a vector has one column

    def read(self, start: int, stop: int) -> Float32:
        """Return rows [start, stop)."""
        n_cols = self.shape[1]
        return self.values.read(start * n_cols, stop * n_cols).reshape(-1, n_cols)

    def nbytes(self, n_rows: int) -> int:
        """Bytes that reading so many rows takes at most."""
        return self.values.nbytes(n_rows * self.shape[1])


@dataclass(frozen=True, slots=True)
class SparseRows:
    """The largest elements of a change, by groups of `GROUP` elements.

    Example: the elements 3 and 300 are 0.5 and 2. The ends of the groups are 1 and 2, the places 3 and 44,
    the values 0.5 and 2.
    """

    fill_ends: Fill  # int32 of each group: values up to its end
    fill_places: Fill  # a byte of each value: its place in the group
    values: StoredValues
    count: int  # of values
    shape: tuple[int, int]

    def read(self, start: int, stop: int) -> Float32:
        """Return rows [start, stop).

        Raises
        ------
        FormatError
            The groups contradict each other.
        """
        n_cols = self.shape[1]
        first, last = start * n_cols // GROUP, -(-stop * n_cols // GROUP)
        ends, begin = self._read_ends(first, last)
        n = int(ends[-1]) - begin
        places = np.empty(n, np.uint8)
        values = np.empty(0, np.float32)
        if n:
            self.fill_places(begin, places)
            values = self.values.read(begin, begin + n)
        rows = np.empty((stop - start, n_cols), np.float32)
        skipped = start * n_cols - first * GROUP
        deltas.scatter(ends, begin, skipped, places, values, rows.reshape(-1))
        return rows

    def _read_ends(self, first: int, last: int) -> tuple[NDArray[np.int32], int]:
        """Return the ends of groups [first, last), and the end of the group before."""
        before = min(1, first)
        raw = np.empty(4 * (last - first + before), np.uint8)
        self.fill_ends(4 * (first - before), raw)
        ends = raw.view(np.int32)
        begin = int(ends[0]) if before else 0
        falls = int(ends[0]) < 0 or bool((ends[1:] < ends[:-1]).any())
        if falls or int(ends[-1]) > self.count or self._are_overfull(ends[before:], begin):
            raise FormatError(
                "holds groups that do not follow each other, or of more values than elements; the delta is "
                "damaged, get it again",
                path=self.values.path,
                tensor=self.values.spec.name,
            )
        return ends[before:], begin

    def _are_overfull(self, ends: NDArray[np.int32], begin: int) -> bool:
        """Tell whether a group has more values than elements, which would take any memory to read."""
        return int(ends[0]) - begin > GROUP or bool((ends[1:] - ends[:-1] > GROUP).any())

    def nbytes(self, n_rows: int) -> int:
        """Bytes that reading so many rows takes at most."""
        n = n_rows * self.shape[1]
        most = min(n + 2 * GROUP, self.count)
        return 4 * n + 8 * (n // GROUP + 3) + most + self.values.nbytes(most)
