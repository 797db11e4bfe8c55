"""A change of one tensor, measured and read in pieces of a fixed size: no result depends on memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from isal.isal_zlib import crc32

from edgemerge.formats.gguf.types import block_size
from edgemerge.formats.quants.codec import CODECS
from edgemerge.native import KernelFile
from edgemerge.planning.differences import PIECE, Change
from edgemerge.types import Float32, UInt8

__all__ = ["Measured", "TensorOut", "encode_piece", "losses", "measure", "pieces"]
__all__ += ["squared_error"]

LANES = 32  # of the kernels
LARGEST_HALF = 15  # power of two that binary16 holds, with room for a block's sums
LARGEST_EXPONENT = 100

deltas = KernelFile("deltas")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one pass over a change found."""

    change: Change
    squares: float  # the sum of the squares of its elements: its energy
    largest: float  # magnitude
    checksums: tuple[int, int]  # CRC-32 of the stored rows of base and expert

    @property
    def n_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.change.shape)

    @property
    def exponent(self) -> int:
        """Power of two by which the change is divided, so that its root mean square is from 0.5 to 1.

        Then scales of blocks are numbers that binary16 has with all its digits.
        """
        if self.change.is_vector:
            return 0
        mean = math.sqrt(self.squares / self.n_elements)
        found = max(math.frexp(mean)[1], math.frexp(self.largest)[1] - LARGEST_HALF)
        return max(-LARGEST_EXPONENT, min(LARGEST_EXPONENT, found))

    def pieces(self, stop: threading.Event) -> Iterator[tuple[int, Float32]]:
        """Read the change, divided by two to its exponent; see `pieces`."""
        return pieces(self.change, 2.0**-self.exponent, stop)


def measure(change: Change, stop: threading.Event) -> Measured:
    """Read a change once.

    Raises
    ------
    FormatError, Stopped
        As of `Change.pairs`.
    """
    lanes, found = np.empty(LANES), np.empty(2)
    squares, largest, left, right = 0.0, 0.0, 0, 0
    for _, left_u8, right_u8 in change.stored(stop):
        left, right = crc32(left_u8.data, left), crc32(right_u8.data, right)
        before, after = change.decode(left_u8, right_u8)
        np.subtract(after, before, out=after)
        deltas.measure(after.reshape(-1), lanes, found)
        squares += float(found[0])
        largest = max(largest, float(found[1]))
    change.forget()
    return Measured(change, squares, largest, (left, right))


def pieces(change: Change, factor: float, stop: threading.Event) -> Iterator[tuple[int, Float32]]:
    """Read a change times a factor in pieces of `PIECE` elements, the last perhaps shorter.

    Yields the number of the first element, and the elements (n,), which are valid until the next piece.
    """
    buffer = np.empty(PIECE, np.float32)
    first = filled = 0
    for _, rows in change.blocks(stop):
        values, at = rows.reshape(-1), 0
        while at < values.size:
            n = min(PIECE - filled, values.size - at)
            np.multiply(values[at : at + n], np.float32(factor), out=buffer[filled : filled + n])
            filled, at = filled + n, at + n
            if filled == PIECE:
                yield first, buffer
                first, filled = first + PIECE, 0
    if filled:
        yield first, buffer[:filled]
    change.forget()


def encode_piece(values: Float32, dtype: str, scratch: Float32) -> tuple[UInt8, Float32]:
    """Encode a piece, with zeros up to a whole block.

    Returns
    -------
    raw : uint8 array
        The blocks.
    decoded : float32 array, as long as `values`
        What they hold.
    """
    length, size = block_size(dtype)
    n_blocks = -(-values.size // length)
    padded = values
    if values.size % length:
        padded = np.zeros(n_blocks * length, np.float32)
        padded[: values.size] = values
    raw = np.empty(n_blocks * size, np.uint8)
    CODECS[dtype].encode(padded, raw, scratch)
    decoded = np.empty(padded.size, np.float32)
    CODECS[dtype].decode(raw, decoded)
    return raw, decoded[: values.size]


def squared_error(values: Float32, decoded: Float32) -> float:
    """Return the sum of the squares of what a code lost."""
    found = np.empty(1)
    deltas.squared_error(values, decoded, np.empty(LANES), found)
    return float(found[0])


def losses(measured: Measured, stop: threading.Event, *, dtypes: Sequence[str]) -> list[float]:
    """Return the energy that each of some types would lose of a change."""
    lost = [0.0] * len(dtypes)
    scratch = np.empty(max(CODECS[dtype].scratch_len for dtype in dtypes), np.float32)
    for _, values in measured.pieces(stop):
        for i, dtype in enumerate(dtypes):
            lost[i] += squared_error(values, encode_piece(values, dtype, scratch)[1])
    return [one * 4.0**measured.exponent for one in lost]


class TensorOut:
    """One tensor of the file to be, written from its first byte to its last."""

    def __init__(self, write: Callable[[UInt8, int], None], offset: int) -> None:
        self._write, self._at = write, offset
        self.checksum = 0

    def add(self, raw_u8: UInt8) -> None:
        """Write the next bytes."""
        self._write(raw_u8, self._at)
        self._at += raw_u8.nbytes
        self.checksum = crc32(raw_u8.data, self.checksum)
