"""The forms in which a delta stores the change of one tensor; see `edgemerge.formats.adapters.delta`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import FormatError
from edgemerge.formats.adapters.delta import SPARSE, SPARSE_TYPES
from edgemerge.formats.adapters.delta_values import GROUP
from edgemerge.formats.gguf.types import block_size, row_bytes
from edgemerge.formats.quants.codec import CODECS
from edgemerge.merging.adapter_files import encode_part
from edgemerge.merging.adapter_parts import AdapterPart
from edgemerge.merging.delta_pieces import Measured, TensorOut, encode_piece, squared_error
from edgemerge.methods.selection import COUNTER_BYTES
from edgemerge.native import KernelFile
from edgemerge.planning.differences import PIECE
from edgemerge.types import Float32, TensorSpec

__all__ = ["WHOLE", "Coded", "Form", "LowRankForm", "Outs", "SparseForm", "find_largest"]
__all__ += ["work_bytes"]

WHOLE = "F32"  # of vectors
VALUE_TYPE = "Q8_0"  # of sparse values
VALUES_AT_ONCE = block_size(VALUE_TYPE)[0]
HIGH, LOW = 1 << 15, 1 << 16  # counters of the radix select
MAGNITUDE = np.uint32(0x7FFFFFFF)

Outs = Mapping[str, TensorOut]
"""Where each stored tensor is written, by name."""

select = KernelFile("select")


class Form(Protocol):
    """How one change is stored."""

    @property
    def measured(self) -> Measured:
        """The change."""

    @property
    def exponent(self) -> int:
        """Power of two that stored numbers are multiplied by."""

    def specs(self) -> list[TensorSpec]:
        """List the tensors that it is stored as."""

    def write(self, outs: Outs, stop: threading.Event) -> float:
        """Write them, and return how much of the energy they lack."""


@dataclass(frozen=True, slots=True)
class Coded:
    """All of a change in blocks of a ggml type."""

    measured: Measured
    dtype: str

    @property
    def exponent(self) -> int:
        """Power of two that stored numbers are multiplied by."""
        return self.measured.exponent

    def specs(self) -> list[TensorSpec]:
        """List the one tensor: in the base's shape, or as one row where its rows are no whole blocks."""
        spec, length = self.measured.change.specs[0], block_size(self.dtype)[0]
        shape = spec.shape if spec.n_cols % length == 0 else (_whole(spec.n_elements, length),)
        return [_spec(self.measured.change.name, shape, self.dtype)]

    def write(self, outs: Outs, stop: threading.Event) -> float:
        """Write it, and return how much of the energy it lacks."""
        out, lost = outs[self.measured.change.name], 0.0
        scratch = np.empty(CODECS[self.dtype].scratch_len, np.float32)
        for _, values in self.measured.pieces(stop):
            raw, decoded = encode_piece(values, self.dtype, scratch)
            out.add(raw)
            lost += squared_error(values, decoded)
        return lost * 4.0**self.exponent


@dataclass(frozen=True, slots=True)
class SparseForm:
    """The largest elements of a change, with their places."""

    measured: Measured
    count: int  # of elements
    least: int  # bits of the least magnitude that is stored
    ties: int  # how many of that magnitude are stored: the first

    @property
    def exponent(self) -> int:
        """Power of two that stored numbers are multiplied by."""
        return self.measured.exponent

    def specs(self) -> list[TensorSpec]:
        """List ends of groups, places and values."""
        names = [f"{self.measured.change.name}.{kind}" for kind in SPARSE]
        n_groups = -(-self.measured.n_elements // GROUP)
        n_values = _whole(self.count, block_size(VALUE_TYPE)[0])
        sizes = (n_groups, self.count, n_values)
        dtypes = (*SPARSE_TYPES, VALUE_TYPE)
        return [_spec(name, (n,), t) for name, n, t in zip(names, sizes, dtypes, strict=True)]

    def write(self, outs: Outs, stop: threading.Event) -> float:
        """Write them, and return how much of the energy they lack."""
        ends, places, values = (outs[spec.name] for spec in self.specs())
        total, ties, lost = 0, self.ties, 0.0
        waiting = np.empty(0, np.float32)
        for _, piece in self.measured.pieces(stop):
            chosen, ties = self._choose(piece, ties)
            groups = np.bincount(chosen // GROUP, minlength=-(-piece.size // GROUP))
            ends.add((total + np.cumsum(groups)).astype("<i4").view(np.uint8))
            places.add((chosen % GROUP).astype(np.uint8))
            total += chosen.size
            rest = piece.copy()
            rest[chosen] = 0.0
            lost += squared_error(rest, np.zeros_like(rest))
            waiting = np.concatenate([waiting, piece[chosen]])
            n = waiting.size // VALUES_AT_ONCE * VALUES_AT_ONCE
            lost += _add_values(values, waiting[:n])
            waiting = waiting[n:]
        lost += _add_values(values, waiting)
        if total != self.count:  # which the passes before this one counted
            change = self.measured.change
            raise FormatError(
                f"it or {change.base.path} was changed while it was read; let nothing write to them and "
                "start again",
                path=change.expert.path,
                tensor=change.name,
            )
        return lost * 4.0**self.exponent

    def _choose(self, piece: Float32, ties: int) -> tuple[NDArray[np.int64], int]:
        """Return which elements of a piece are stored, and how many of the least may still come."""
        bits = piece.view(np.uint32) & MAGNITUDE
        equal = np.flatnonzero(bits == self.least)[:ties]
        chosen = bits > self.least
        chosen[equal] = True
        return np.flatnonzero(chosen), ties - equal.size


def _add_values(out: TensorOut, values: Float32) -> float:
    """Write sparse values, and return what their blocks lose."""
    if not values.size:
        return 0.0
    raw, decoded = encode_piece(values, VALUE_TYPE, np.empty(0, np.float32))
    out.add(raw)
    return squared_error(values, decoded)


def find_largest(measured: Measured, stop: threading.Event, *, density: float) -> SparseForm:
    """Find the least of the magnitudes that a sparse form stores: two passes of a radix select.

    Parameters
    ----------
    measured : Measured
        Not zero.
    stop : threading.Event
        Stops it.
    density : float
        Part of the elements that is stored, above 0 and at most 1; one element at least, and no zeros.
    """
    high, n_zeros = np.zeros(HIGH, np.uint32), 0
    for _, piece in measured.pieces(stop):
        select.count_high(piece, high)
        n_zeros += piece.size - int(np.count_nonzero(piece))
    wanted = max(1, min(int(density * measured.n_elements), measured.n_elements - n_zeros))
    top, above = _find_bin(high, wanted)
    low = np.zeros(LOW, np.uint32)
    for _, piece in measured.pieces(stop):
        select.count_low(piece, top, low)
    bottom, more = _find_bin(low, wanted - above)
    return SparseForm(measured, wanted, top << 16 | bottom, wanted - above - more)


def _find_bin(counts: NDArray[np.uint32], wanted: int) -> tuple[int, int]:
    """Return the bin in which the wanted rank falls, from the top, and how many are above it."""
    from_top = np.cumsum(counts[::-1], dtype=np.int64)
    i = int(np.searchsorted(from_top, wanted))
    return counts.size - 1 - i, int(from_top[i - 1]) if i else 0


@dataclass(frozen=True, slots=True)
class LowRankForm:
    """Two factors."""

    measured: Measured
    parts: Sequence[AdapterPart]
    lost: float  # energy, by the singular values
    alpha: float  # of the whole file, as of a LoRA adapter
    exponent: int = 0

    def specs(self) -> list[TensorSpec]:
        """List both factors."""
        return [part.tensor.spec for part in self.parts]

    def write(self, outs: Outs, stop: threading.Event) -> float:
        """Write them, and return how much of the energy they lack."""
        for part in self.parts:
            for piece in encode_part(part, "--bits"):
                outs[part.tensor.name].add(piece)
        return self.lost


def work_bytes() -> int:
    """Bytes that making any form takes at most, beside what the change is read into."""
    return 40 * PIECE + COUNTER_BYTES


def _spec(name: str, shape: tuple[int, ...], dtype: str) -> TensorSpec:
    spec = TensorSpec(name, shape, dtype, 0)
    return TensorSpec(name, shape, dtype, spec.n_rows * row_bytes(dtype, spec.n_cols))


def _whole(n: int, length: int) -> int:
    return -(-n // length) * length
