"""Stands for llama.cpp's cache: sequences as lists of tokens, in a pool of cells."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemerge.runtime.batch import PoolFull

__all__ = ["FakeContext", "FakeLlama", "FakeModel"]


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

    def llama_set_embeddings(self, _context: Any, _wanted: bool) -> None:
        pass

    def llama_get_embeddings_seq(self, _context: Any, sequence: int) -> Any:
        token = self.cells[sequence][0]
        return [token if token >= 0 else np.nan]

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


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A model whose token t has the embedding (t, 1); what it draws is up to a sampler."""

    api: FakeLlama
    pooling: str = "2"  # a text has its first token's
    n_embd_out: int = 2
    keeps_state: bool = False

    def is_end(self, token: int) -> bool:
        return token == 0

    def piece(self, token: int) -> bytes:
        return b"a"


class FakeContext:
    """A pool of cells.

    Parameters
    ----------
    api : FakeLlama
        Has them.
    n_ctx : int
        How many.
    """

    handle = None

    def __init__(self, api: FakeLlama, n_ctx: int) -> None:
        self.api = api
        self.n_ctx = n_ctx

    def batch(self, size: int) -> FakeBatch:
        return FakeBatch(self, size)


class FakeBatch:
    """Tokens that are put into the pool when it is run."""

    def __init__(self, context: FakeContext, size: int) -> None:
        self.size = size
        self._context = context
        self._tokens: list[tuple[int, int]] = []

    @property
    def n(self) -> int:
        return len(self._tokens)

    def clear(self) -> None:
        self._tokens = []

    def add(self, token: int, _position: int, sequence: int) -> int:
        self._tokens.append((token, sequence))
        return self.n - 1

    def add_all(self, tokens: list[int], _position: int, sequence: int, *, output: bool) -> int:
        self._tokens += ((token, sequence) for token in tokens)
        return self.n - len(tokens)

    def want(self, _place: int) -> None:
        pass

    def run(self) -> None:
        api = self._context.api
        if api.n_taken + self.n > self._context.n_ctx:
            raise PoolFull("no room")
        for token, sequence in self._tokens:
            api.cells.setdefault(sequence, []).append(token)

    def embeddings(self, _width: int) -> Any:
        return np.array([(token if token >= 0 else np.nan, 1) for token, _ in self._tokens])
