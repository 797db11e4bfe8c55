"""Where one tensor of an output lies, and in which order its rows lie there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from isal.isal_zlib import crc32

from edgemerge.formats.hub.rotary import rotary_runs
from edgemerge.output.file import OutputFile
from edgemerge.types import TensorSpec, UInt8

__all__ = ["Places", "TensorPlace"]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """The bytes of one tensor in its file."""

    file: OutputFile
    offset: int
    spec: TensorSpec  # of the output
    head_length: int = 0  # items of a head that are stored in another order; 0: as GGUF has them

    @property
    def end(self) -> int:
        """Position of the first byte after the tensor."""
        return self.offset + self.spec.nbytes

    def write_rows(self, start: int, raw_u8: UInt8) -> None:
        """Write rows from `start` on, which are in GGUF's order; thread-safe.

        Raises
        ------
        OutputError
            The disk refused.
        """
        row_bytes = self.spec.row_bytes
        if not self.head_length:
            self.file.write(raw_u8, self.offset + start * row_bytes)
            return
        width = self._item_bytes
        first = start * row_bytes // width
        view = raw_u8.data.cast("B")
        for at, places in rotary_runs(first, first + len(view) // width, self.head_length):
            items = [view[i * width : (i + 1) * width] for i in places]
            self.file.write_items(items, self.offset + at * width)

    def crc32(self) -> int:
        """Return the CRC-32 of the rows in GGUF's order, as they are on disk."""
        if not self.head_length:
            return self.file.crc32(self.offset, self.spec.nbytes)
        width, checksum = self._item_bytes, 0
        head_u8 = np.empty(self.head_length * width, np.uint8)
        view = head_u8.data.cast("B")
        self.file.forget(self.offset, self.spec.nbytes)
        for first in range(0, self.spec.nbytes // width, self.head_length):
            for at, places in rotary_runs(first, first + self.head_length, self.head_length):
                items = [view[i * width : (i + 1) * width] for i in places]
                self.file.read_items(items, self.offset + at * width)
            checksum = crc32(view, checksum)
        self.file.forget(self.offset, self.spec.nbytes)
        return checksum

    @property
    def _item_bytes(self) -> int:
        """Bytes of a row of a matrix, or of an element of a bias."""
        shape = self.spec.shape
        return self.spec.row_bytes if len(shape) > 1 else self.spec.nbytes // self.spec.n_cols


Places: TypeAlias = Mapping[str, TensorPlace]  # by GGUF name
