"""What an adapter does to rows of one tensor of its base."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from edgemerge.formats.adapters.factors import Factor
from edgemerge.native import KernelFile
from edgemerge.types import Float32

__all__ = ["LowRank", "Rows", "Scratch", "Update"]

SUMS, LANES = 4096, 32  # of the kernels

linear, lora = KernelFile("linear"), KernelFile("lora")


class Rows(Protocol):
    """A matrix that is read by rows."""

    def read(self, start: int, stop: int) -> Float32:
        """Return rows [start, stop), C-contiguous, as an array of their own."""

    def nbytes(self, n_rows: int) -> int:
        """Bytes that reading so many rows takes at most."""


class LowRank(NamedTuple):
    """A change `scale * left @ right`: B and A."""

    left: Factor  # (n_rows, rank)
    right: Factor  # (rank, n_cols)
    scale: float


class _Sums(threading.local):
    """What the kernels of one thread add up in, for all models: a merge may have a thousand of them."""

    def __init__(self) -> None:
        self.columns = np.empty(SUMS, np.float32)
        self.lanes = np.empty(LANES, np.float64)


_sums = _Sums()


class Scratch:
    """One thread's memory for a model: the last A of each adapter, which all blocks of a tensor use."""

    def __init__(self) -> None:
        self._right: dict[int, tuple[Factor, Float32]] = {}

    def add(self, change: LowRank, number: int, start: int, stop: int, out_f32: Float32) -> None:
        """Add rows [start, stop) of a change of the adapter of that number to `out_f32`."""
        known, right = self._right.get(number, (None, None))
        if known is not change.right or right is None:
            self._right.pop(number, None)  # before the next is read: one at a time
            right = change.right.read(0, change.right.shape[0])
            self._right[number] = change.right, right
        left = change.left.read(start, stop)
        lora.add_product(left, right, change.scale, _sums.columns, out_f32)

    def rescale(self, magnitude_f32: Float32, out_f32: Float32) -> None:
        """Give rows the norms that DoRA trained."""
        lora.rescale_rows(magnitude_f32, _sums.lanes, out_f32)


@dataclass(frozen=True, slots=True)
class Update:
    """One adapter's change of rows [first, first + n_rows) of a tensor; a vector's rows are its elements."""

    first: int
    n_rows: int
    replacement: Factor | None = None  # (n_rows, n_cols): stands for the base's rows
    added: tuple[Rows, float] | None = (
        None  # (n_rows, n_cols) and a factor: a delta, LoRA's own bias
    )
    change: LowRank | None = None
    magnitude: Factor | None = None  # (n_rows, 1): DoRA's norms of the changed rows

    @property
    def is_sum(self) -> bool:
        """Whether it only adds to the base, so that a weight can be part of the scale."""
        return self.replacement is None and self.magnitude is None

    def apply(
        self, scratch: Scratch, number: int, weight: float, start: int, stop: int, out_f32: Float32
    ) -> None:
        """Change rows [start, stop) of its own, which hold the base's values.

        Parameters
        ----------
        scratch : Scratch
            The thread's.
        number : int
            The adapter's, which finds its A in the scratch.
        weight : float
            By how much the change is multiplied.
        start, stop : int
            Rows, from 0 to `n_rows`.
        out_f32 : (stop - start, n_cols) float32
            Changed in place.
        """
        if self.replacement is not None:
            out_f32[:] = self.replacement.read(start, stop)
        if self.added is not None:
            matrix, factor = self.added
            values = matrix.read(start, stop)
            linear.add_scaled(values.reshape(-1), factor * weight, out_f32.reshape(-1))
        if self.change is not None:
            change = self.change._replace(scale=self.change.scale * weight)
            scratch.add(change, number, start, stop, out_f32)
        if self.magnitude is not None:
            magnitude = self.magnitude.read(start, stop).reshape(-1)
            scratch.rescale(magnitude, out_f32)

    def nbytes(self, n_rows: int) -> int:
        """Bytes that `apply` takes at most for so many rows, A left out."""
        parts: list[Rows | None] = [self.replacement, self.magnitude]
        parts.append(self.added[0] if self.added else None)
        parts.append(self.change.left if self.change else None)
        return sum(part.nbytes(n_rows) for part in parts if part is not None)
