"""Sequences that were computed and are not in use, outside of llama.cpp's cache.

Attention looks at all tokens of the cache, if only to find that they are another sequence's: on SmolLM2-135M
a thousand of them cost each token 7 %. So what may be wanted again is copied out, and back in when it is.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgemerge.runtime.engine.messages import TokenScore

__all__ = ["Kept", "Store", "common_length"]


@dataclass(frozen=True, eq=False, slots=True)
class Kept:
    """A sequence.

    Attributes
    ----------
    tokens : list of int
        What it has.
    scores : list of TokenScore
        Of its first tokens, as far as they were scored.
    n_alternatives : int
        That these scores name.
    data : mmap
        llama.cpp's copy of it.
    """

    tokens: list[int]
    scores: list[TokenScore]
    n_alternatives: int
    data: mmap.mmap  # goes back to the system when it is forgotten, whatever its size


class Store:
    """Kept sequences, those longest unused first.

    Parameters
    ----------
    api : module
        llama_cpp.
    context : pointer
        llama.cpp's context.
    most : int
        Bytes at most.
    """

    def __init__(self, api: Any, context: Any, most: int) -> None:
        self._api = api
        self._context = context
        self._most = most
        self._kept: list[Kept] = []

    @property
    def n_bytes(self) -> int:
        """Bytes that are taken."""
        return sum(len(kept.data) for kept in self._kept)

    def __iter__(self) -> Iterator[Kept]:
        """All of them."""
        return iter(self._kept)

    def save(
        self, sequence: int, tokens: list[int], scores: list[TokenScore], n_alternatives: int
    ) -> None:
        """Copy a sequence out; what begins others is not kept twice."""
        if any(kept.tokens[: len(tokens)] == tokens for kept in self._kept):
            return
        self._kept = [kept for kept in self._kept if tokens[: len(kept.tokens)] != kept.tokens]
        size = self._api.llama_state_seq_get_size(self._context, sequence)
        if size > self._most:
            return
        while self.n_bytes + size > self._most:
            del self._kept[0]
        data = mmap.mmap(-1, size)
        if self._api.llama_state_seq_get_data(self._context, _bytes(data), size, sequence) == size:
            self._kept.append(Kept(tokens, scores, n_alternatives, data))

    def use(self, kept: Kept) -> None:
        """Note that one is wanted: all others make room before it."""
        self._kept.remove(kept)
        self._kept.append(kept)

    def bring_back(self, kept: Kept, sequence: int) -> bool:
        """Copy one into an empty sequence; False where the cache has no room for it."""
        size = len(kept.data)
        data = _bytes(kept.data)
        return bool(self._api.llama_state_seq_set_data(self._context, data, size, sequence) == size)


def _bytes(data: mmap.mmap) -> Any:
    return (ctypes.c_uint8 * len(data)).from_buffer(data)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements two lists have in common at their beginning; slices are compared in C."""
    low, high = 0, min(len(a), len(b))
    if not high or a[0] != b[0]:
        return 0
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
