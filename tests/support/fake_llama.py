"""Stands for llama.cpp's cache: sequences as lists of tokens, in a pool of cells."""

from __future__ import annotations

import ctypes
import json
from typing import Any

__all__ = ["FakeLlama"]


class FakeLlama:
    """What the engine asks of the module llama_cpp about sequences.

    Parameters
    ----------
    keeps_state : bool
        Whether a sequence can be forgotten as a whole only.

    Attributes
    ----------
    cells : dict
        Tokens by sequence.
    """

    SIZE = 4096  # bytes of a sequence that is copied out

    def __init__(self, *, keeps_state: bool = False) -> None:
        self.cells: dict[int, list[int]] = {}
        self._keeps_state = keeps_state

    @property
    def n_taken(self) -> int:
        """Cells that are taken."""
        return sum(map(len, self.cells.values()))

    def llama_get_memory(self, _context: Any) -> Any:
        return self

    def llama_memory_seq_rm(self, _memory: Any, sequence: int, first: int, _end: int) -> bool:
        if first > 0 and self._keeps_state:
            return False
        self.cells[sequence] = self.cells.get(sequence, [])[: max(first, 0)]
        return True

    def llama_memory_seq_cp(
        self, _memory: Any, source: int, target: int, first: int, end: int
    ) -> None:
        self.cells[target] = self.cells[source][first:end]

    def llama_state_seq_get_size(self, _context: Any, _sequence: int) -> int:
        return self.SIZE

    def llama_state_seq_get_data(self, _context: Any, data: Any, size: int, sequence: int) -> int:
        text = json.dumps(self.cells[sequence]).encode()
        ctypes.memmove(data, text.ljust(size), size)
        return size

    def llama_state_seq_set_data(self, _context: Any, data: Any, size: int, sequence: int) -> int:
        self.cells[sequence] = json.loads(bytes(data))
        return size
