"""Tokens of several sequences in one call of llama.cpp; whatever computes lays them out here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.library import Library
from edgemerge.types import Float32

__all__ = ["Aborted", "Batch", "DecodeError", "PoolFull", "read_logits"]

_FULL, _ABORTED = 1, 2  # llama_decode: no room, or told to stop


class DecodeError(RuntimeFailure):
    """llama.cpp could not compute a batch; the text names no file."""


class Aborted(DecodeError):
    """The context's abort callback ended the computation; the cache may have a part of the batch.

    llama.cpp takes that out again where it can. A running state keeps it.
    """


class PoolFull(DecodeError):
    """The cache has no room for the tokens of a batch; it is as it was before."""


class Computing(Protocol):
    """What a batch needs of a model (`edgemerge.runtime.llama.Model`)."""

    api: Any
    library: Library
    n_vocab: int


class Batch:
    """Buffers of a `llama_batch`, filled anew for each call.

    Parameters
    ----------
    model : Model
        What computes.
    context : pointer
        llama.cpp's context.
    size : int
        Most tokens of one call.
    """

    def __init__(self, model: Computing, context: Any, size: int) -> None:
        self.size = size
        self.n = 0
        self._model = model
        self._api = model.api
        self._context = context
        self._token = np.zeros(size, np.int32)
        self._position = np.zeros(size, np.int32)
        self._output = np.zeros(size, np.int8)
        self._n_ids = np.zeros(size, np.int32)
        self._ids = np.zeros(size, np.uint64)
        # A token's sequences are a part of all: llama.cpp gets the place of the first, and how many.
        self._row = ctypes.c_float * model.n_vocab
        self._sequences = np.arange(self._api.llama_n_seq_max(context), dtype=np.int32)
        self._first_sequence = self._sequences.ctypes.data
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
        i = self.n  # set one by one: slices cost a token of a small model half a percent
        self._token[i] = token
        self._position[i] = position
        self._n_ids[i] = 1
        self._ids[i] = self._first_sequence + 4 * sequence
        self._output[i] = True
        self.n = i + 1
        return i

    def add_all(
        self,
        tokens: Sequence[int] | NDArray[np.int32],
        position: int,
        sequence: int,
        *,
        output: bool | Sequence[bool],
        n_sequences: int = 1,
    ) -> int:
        """Add tokens that follow each other; give the place of the first.

        Parameters
        ----------
        tokens : (n,) int
            Ids.
        position, sequence : int
            Of the first one in its sequence, and which that is.
        output : bool, or (n,) bool
            Whether the logits of all are wanted, or of each.
        n_sequences : int
            So many sequences, from that one on, have all these tokens, which are computed once.
        """
        start, end = self.n, self.n + len(tokens)
        self._token[start:end] = tokens
        self._position[start:end] = range(position, position + len(tokens))
        self._n_ids[start:end] = n_sequences
        self._ids[start:end] = self._first_sequence + 4 * sequence
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
        library = self._model.library
        library.log.clear()
        status = self._api.llama_decode(self._context, self._batch)
        if status != 0:
            said = library.failure(f"llama.cpp failed on {self.n} tokens with status {status}")
            kind = {_FULL: PoolFull, _ABORTED: Aborted}.get(status, DecodeError)
            raise kind(str(said), detail=said.detail)

    def logits(self, i: int) -> Float32:
        """Give the (n_vocab,) logits of the token at a place; a view that holds until the next call."""
        return read_logits(self._api, self._context, i, self._row)

    def all_logits(self) -> Float32:
        """Give the (n, n_vocab) logits of those that are wanted, in order; a view as of `logits`."""
        n = int(self._output[: self.n].sum())
        if n == 0:
            return np.empty((0, self._model.n_vocab), dtype=np.float32)
        rows = self._api.llama_get_logits(self._context)
        view: Float32 = np.ctypeslib.as_array(rows, shape=(n, self._model.n_vocab))
        return view

    def embeddings(self, width: int) -> Float32:
        """Give the (n, width) embeddings of all tokens; a view that holds until the next call."""
        rows = self._api.llama_get_embeddings(self._context)
        view: Float32 = np.ctypeslib.as_array(rows, shape=(self.n, width))
        return view


def read_logits(api: Any, context: Any, i: int, row: type[ctypes.Array[ctypes.c_float]]) -> Float32:
    """Give the (n_vocab,) logits of the token at a place of the last batch; a view until the next one.

    Parameters
    ----------
    api : module
        llama_cpp.
    context : pointer
        llama.cpp's context.
    i : int
        The place.
    row : type
        An array of n_vocab C floats; `numpy.ctypeslib` would make it anew for each token.
    """
    first = api.llama_get_logits_ith(context, i)
    floats: Any = row.from_address(ctypes.addressof(first.contents))
    return np.frombuffer(floats, np.float32)


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
