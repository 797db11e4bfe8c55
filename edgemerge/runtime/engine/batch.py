"""Tokens of several sequences in one call of llama.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edgemerge.runtime.context import Context
from edgemerge.types import Float32

__all__ = ["Aborted", "Batch", "DecodeError", "PoolFull"]

_FULL, _ABORTED = 1, 2  # llama_decode: no room, or told to stop; the cache is as it was before


class Aborted(Exception):
    """The context's abort callback ended the computation; the cache is as it was before."""


class PoolFull(Exception):
    """The cache has no room for the tokens of a batch; it is as it was before."""


class DecodeError(Exception):
    """llama.cpp could not compute a batch."""


class Batch:
    """Buffers of a `llama_batch`, filled anew for each call.

    Parameters
    ----------
    context : Context
        Where it is computed.
    size : int
        Most tokens of one call.
    """

    def __init__(self, context: Context, size: int) -> None:
        self.size = size
        self.n = 0
        self._context = context
        self._api = context.model.api
        self._token = np.zeros(size, np.int32)
        self._position = np.zeros(size, np.int32)
        self._sequence = np.zeros(size, np.int32)
        self._output = np.zeros(size, np.int8)
        self._n_ids = np.ones(size, np.int32)
        self._ids = (self._sequence.ctypes.data + 4 * np.arange(size)).astype(np.uint64)
        self._batch = self._api.llama_batch(
            n_tokens=0,
            token=_pointer(self._token, ctypes.c_int32),
            pos=_pointer(self._position, ctypes.c_int32),
            n_seq_id=_pointer(self._n_ids, ctypes.c_int32),
            seq_id=_pointer(self._ids, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._output, ctypes.c_int8),
        )

    def clear(self) -> None:
        """Take all tokens out."""
        self.n = 0

    def add(self, token: int, position: int, sequence: int) -> int:
        """Add a token whose logits are wanted; give its place in the batch."""
        i = self.n
        self._token[i] = token
        self._position[i] = position
        self._sequence[i] = sequence
        self._output[i] = 1
        self.n = i + 1
        return i

    def add_all(self, tokens: list[int], position: int, sequence: int, *, output: bool) -> int:
        """Add tokens of one sequence; give the place of the first.

        Parameters
        ----------
        tokens : (n,) list of int
            Ids.
        position, sequence : int
            Of the first one in its sequence, and which that is.
        output : bool
            Whether the logits of all are wanted, else of none.
        """
        start, end = self.n, self.n + len(tokens)
        self._token[start:end] = tokens
        self._position[start:end] = range(position, position + len(tokens))
        self._sequence[start:end] = sequence
        self._output[start:end] = output
        self.n = end
        return start

    def want(self, i: int) -> None:
        """Ask for the logits of the token at a place."""
        self._output[i] = 1

    def run(self) -> None:
        """Compute.

        Raises
        ------
        PoolFull
            The cache has no room.
        Aborted
            It was told to stop.
        DecodeError
            llama.cpp failed.
        """
        self._batch.n_tokens = self.n
        library = self._context.model.library
        library.log.clear()
        status = self._api.llama_decode(self._context.handle, self._batch)
        if status == _FULL:
            raise PoolFull
        if status == _ABORTED:
            raise Aborted
        if status != 0:
            said = library.failure(f"llama.cpp failed with status {status}")
            raise DecodeError(str(said))

    def logits(self, i: int) -> Float32:
        """Give the (n_vocab,) logits of the token at a place; a view that holds until the next call."""
        row = self._api.llama_get_logits_ith(self._context.handle, i)
        view: Float32 = np.ctypeslib.as_array(row, shape=(self._context.model.n_vocab,))
        return view

    def embeddings(self, width: int) -> Float32:
        """Give the (n, width) embeddings of all tokens; a view that holds until the next call."""
        rows = self._api.llama_get_embeddings(self._context.handle)
        view: Float32 = np.ctypeslib.as_array(rows, shape=(self.n, width))
        return view


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
