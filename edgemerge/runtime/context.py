"""Sequences of tokens under computation, over llama.cpp's C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.batch import Batch, Computing, DecodeError
from edgemerge.runtime.closing import Closing
from edgemerge.runtime.library import Buffers
from edgemerge.types import Float32

__all__ = ["Context"]


class LoadedModel(Computing, Protocol):
    """What a context needs of a model (`edgemerge.runtime.llama.Model`)."""

    path: Path
    buffers: Buffers

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


class Context(Closing):
    """Sequences under computation; use it in a `with` statement. Made by `Model.context`."""

    def __init__(self, model: LoadedModel, handle: Any) -> None:
        self.model = model
        self.handle = handle
        self._api = model.api
        self.n_ctx: int = model.api.llama_n_ctx(handle)
        self.buffers: Buffers = model.buffers | model.library.buffers()
        self._add_loras()

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

    def batch(self, size: int) -> Batch:
        """Make a batch of so many tokens at most, to be filled and run again and again."""
        return Batch(self.model, self.handle, size)

    def run(self, batch: Batch) -> None:
        """Compute a batch.

        Raises
        ------
        RuntimeFailure
            llama.cpp failed; it names the model's file.
        """
        try:
            batch.run()
        except DecodeError as error:
            raise RuntimeFailure(f"{self.model.path}: {error}", detail=error.detail) from error

    def decode(
        self, tokens: Sequence[int], wanted: Sequence[bool], *, position: int = 0
    ) -> Float32:
        """Run tokens of one sequence through the model.

        Parameters
        ----------
        tokens : (n,) int
            Ids.
        wanted : (n,) bool
            The tokens whose logits are wanted.
        position : int
            Of the first token in the sequence.

        Returns
        -------
        (sum of wanted, n_vocab) float32
            A view that holds until the next call.

        Raises
        ------
        RuntimeFailure
            llama.cpp failed.
        """
        batch = self.batch(len(tokens))
        batch.add_all(tokens, position, 0, output=wanted)
        self.run(batch)
        return batch.all_logits()
