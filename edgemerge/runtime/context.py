"""Sequences of tokens under computation, over llama.cpp's C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.library import Buffers, Library
from edgemerge.types import Float32

__all__ = ["Context"]


class LoadedModel(Protocol):
    """What a context needs of a model (`edgemerge.runtime.llama.Model`)."""

    path: Path
    api: Any
    library: Library
    buffers: Buffers
    n_vocab: int

    @property
    def adapters(self) -> Sequence[Any]:
        """Handles of the LoRA adapters."""

    @property
    def loras(self) -> Sequence[ScaledAdapter]:
        """Their factors."""


class ScaledAdapter(Protocol):
    """A LoRA adapter's factor."""

    @property
    def scale(self) -> float:
        """Factor of what it adds."""


class Context:
    """Sequences under computation; use it in a `with` statement. Made by `Model.context`."""

    def __init__(self, model: LoadedModel, handle: Any) -> None:
        self.model = model
        self.handle = handle
        self._api = model.api
        self.n_ctx: int = model.api.llama_n_ctx(handle)
        self.buffers: Buffers = model.buffers | model.library.buffers()
        self._add_loras()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context."""
        if self.handle:
            self._api.llama_free(self.handle)
            self.handle = None

    def clear(self) -> None:
        """Forget all sequences."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self.handle), False)

    def truncate(self, position: int, *, sequence: int = -1) -> None:
        """Forget what a sequence, or each of them, holds from a position on.

        Parameters
        ----------
        position : int
            The first one to forget.
        sequence : int
            Which sequence; -1 for all.

        Raises
        ------
        RuntimeFailure
            The model keeps a running state (Mamba), of which no end can be cut off.
        """
        memory = self._api.llama_get_memory(self.handle)
        if not self._api.llama_memory_seq_rm(memory, sequence, position, -1):
            raise RuntimeFailure(f"{self.model.path}: this model's memory cannot be cut back")

    def synchronize(self) -> None:
        """Wait until all that was asked of the device is computed."""
        self._api.llama_synchronize(self.handle)

    def _add_loras(self) -> None:
        """Add the model's adapters to what this context computes."""
        count = len(self.model.adapters)
        if count == 0:
            return
        adapters = (self._api.llama_adapter_lora_p_ctypes * count)(*self.model.adapters)
        scales = (ctypes.c_float * count)(*(lora.scale for lora in self.model.loras))
        if self._api.llama_set_adapters_lora(self.handle, adapters, count, scales):
            self.close()
            raise self.model.library.failure(f"{self.model.path}: the LoRA adapters do not fit")

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[tuple[int, ...]],
        wanted: Sequence[bool],
    ) -> Float32:
        """Run tokens through the model.

        Parameters
        ----------
        tokens, positions : (n,) int
            Token ids, and the place of each in its sequence.
        sequences : (n,) tuples of int
            The sequences that each token is part of.
        wanted : (n,) bool
            The tokens whose logits are wanted.

        Returns
        -------
        (sum of wanted, n_vocab) float32
            A view that holds until the next call.
        """
        n_tokens = len(tokens)
        token = np.array(tokens, dtype=np.int32)
        position = np.array(positions, dtype=np.int32)
        output = np.array(wanted, dtype=np.int8)
        n_ids = np.array([len(ids) for ids in sequences], dtype=np.int32)
        ids = np.array([one for several in sequences for one in several], dtype=np.int32)
        starts = np.cumsum(n_ids, dtype=np.uint64) - n_ids.astype(np.uint64)
        id_pointers = np.uint64(ids.ctypes.data) + starts * np.uint64(ids.itemsize)

        int32_p = ctypes.POINTER(ctypes.c_int32)
        batch = self._api.llama_batch(
            n_tokens=n_tokens,
            token=token.ctypes.data_as(int32_p),
            pos=position.ctypes.data_as(int32_p),
            n_seq_id=n_ids.ctypes.data_as(int32_p),
            seq_id=id_pointers.ctypes.data_as(ctypes.POINTER(int32_p)),
            logits=output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self.model.library.start()
        status = self._api.llama_decode(self.handle, batch)
        if status != 0:
            raise self.model.library.failure(
                f"{self.model.path}: llama.cpp failed on {n_tokens} tokens with status {status}"
            )
        rows = int(output.sum())
        if rows == 0:
            return np.empty((0, self.model.n_vocab), dtype=np.float32)
        logits = self._api.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(logits, shape=(rows, self.model.n_vocab))
