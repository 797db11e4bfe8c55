"""Stored values that are not those of GGUF: how the ones are made of the others, and the other way.

Each change works on float32, in place, on any whole rows of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.types import Float32, UInt8

__all__ = ["ITEMS", "Bands", "Change", "Decay", "Offset", "Scaled", "as_f32", "plain_change"]

# Rows up to a number, and what they are multiplied by, one factor after the other
Bands: TypeAlias = tuple[tuple[int, tuple[float, ...]], ...]

ITEMS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Change(Protocol):
    """What is done to stored values."""

    def apply(self, rows: NDArray[np.float32], first: int) -> None:
        """Turn stored rows, (n_rows, n_cols) from number `first` on, into those of GGUF."""
        ...

    def undo(self, rows: NDArray[np.float32], first: int) -> None:
        """Turn rows of GGUF into stored ones; what has none becomes NaN or infinity."""
        ...


def as_f32(raw: UInt8, dtype: str) -> Float32:
    """Return stored values as float32; of F32 a view."""
    values = raw.view(ITEMS[dtype])
    if dtype == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4", copy=False)


@dataclass(frozen=True, slots=True)
class Offset:
    """The vector that Gemma multiplies by: it stores them less 1."""

    offset: float

    def apply(self, rows: NDArray[np.float32], first: int) -> None:
        """See `Change`."""
        rows += np.float32(self.offset)

    def undo(self, rows: NDArray[np.float32], first: int) -> None:
        """See `Change`."""
        rows -= np.float32(self.offset)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rows that GGUF has multiplied by factors: the product is rounded after each factor."""

    bands: Bands

    def apply(self, rows: NDArray[np.float32], first: int) -> None:
        """See `Change`."""
        begin = 0
        for end, factors in self.bands:
            band = rows[max(0, begin - first) : max(0, end - first)]
            for factor in factors:
                band *= np.float32(factor)
            begin = end

    def undo(self, rows: NDArray[np.float32], first: int) -> None:
        """See `Change`."""
        begin = 0
        with np.errstate(over="ignore"):
            for end, factors in self.bands:
                band = rows[max(0, begin - first) : max(0, end - first)]
                for factor in reversed(factors):
                    band /= np.float32(factor)
                begin = end


@dataclass(frozen=True, slots=True)
class Decay:
    """The decay of a state space, -exp of what is stored: `Mamba2Model.modify_tensors` of mamba.py.

    There the exponential is torch's, here a float64 that is rounded, the same on all machines.
    """

    def apply(self, rows: NDArray[np.float32], first: int) -> None:
        """See `Change`."""
        with np.errstate(over="ignore"):  # infinity is refused where it is merged
            rows[:] = -np.exp(rows.astype(np.float64))

    def undo(self, rows: NDArray[np.float32], first: int) -> None:
        """See `Change`: of what does not decay there is no logarithm."""
        with np.errstate(divide="ignore", invalid="ignore"):
            rows[:] = np.log(-rows.astype(np.float64))


def plain_change(norm_offset: float, stem: str) -> Change | None:
    """Return how the values of a tensor become GGUF's, where its rows have no factors.

    Parameters
    ----------
    norm_offset : float
        `Family.norm_offset`.
    stem : str
        GGUF's name without `blk.N.`.
    """
    if stem == "ssm_a":
        return Decay()
    # The norm of a delta net is stored as it is.
    is_less = stem.endswith("norm.weight") and stem != "ssm_norm.weight"
    return Offset(norm_offset) if is_less and norm_offset else None
