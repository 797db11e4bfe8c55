"""The tensors of an adapter to be: what each is called, and what makes it."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgemerge.errors import OutputError
from edgemerge.formats.adapters.layout import ExtractedTensor
from edgemerge.planning.differences import Change
from edgemerge.types import Float32, Source

__all__ = [
    "EMBEDDING",
    "AdapterPart",
    "Extracted",
    "GgufParts",
    "PartMaker",
    "Spool",
    "factor_parts",
]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


class Spool:
    """Arrays of float32 in a file without a name, beside the output, in any order; thread-safe."""

    def __init__(self, file: BinaryIO, output: Path) -> None:
        self._file, self._output, self._lock = file, output, threading.Lock()

    def add(self, values_f32: Float32) -> int:
        """Write an array, and return where it is.

        Raises
        ------
        OutputError
            The disk is full, or cannot be written.
        """
        with self._lock:
            try:
                at = self._file.seek(0, 2)
                self._file.write(np.ascontiguousarray(values_f32).data)
                self._file.flush()
            except OSError as error:
                raise OutputError(
                    f"the disk cannot keep the factors until all are found ({error.strerror}); free some "
                    "space, or choose another",
                    path=self._output,
                ) from None
            return at

    def read(self, at: int, shape: tuple[int, ...]) -> Float32:
        """Read an array back."""
        with self._lock:
            self._file.seek(at)
            return np.fromfile(self._file, np.float32, math.prod(shape)).reshape(shape)


@dataclass(frozen=True, slots=True)
class Extracted:
    """What is kept of one change: where its factors are in the spool, or the expert's whole vector."""

    change: Change
    rank: int  # 0: a vector
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """A tensor of the adapter, and what makes it: all of it, or of a stack one expert after the other."""

    tensor: ExtractedTensor
    makes: tuple[Callable[[], Float32], ...]


def factor_parts(
    base: Source, found: Sequence[Extracted], spool: Spool, dtype: str, alpha: float
) -> list[AdapterPart]:
    """Make both factors of one tensor as llama.cpp names them.

    Parameters
    ----------
    base : Source
        What the factors are for.
    found : sequence of Extracted
        One matrix, or the experts of one stack, those without a change left out.
    spool : Spool
        Where the factors are.
    dtype : str
        F32 or F16.
    alpha : float
        Of the whole file.
    """
    return GgufParts(base, spool, dtype, alpha).factors(found)


class PartMaker:
    """Makes tensors of what is in a spool."""

    def __init__(self, base: Source, spool: Spool, dtype: str, alpha: float) -> None:
        self._base, self._spool = base, spool
        self._dtype, self._alpha = dtype, alpha

    def left(self, one: Extracted, rank: int) -> Float32:
        """Return (n_rows, its rank), scaled so that alpha / rank undoes it."""
        left = self._spool.read(one.left, (one.change.shape[0], one.rank))
        left *= np.float32(rank / self._alpha)
        return left

    def right(self, one: Extracted) -> Float32:
        """Return (its rank, n_cols)."""
        return self._spool.read(one.right, (one.rank, one.change.shape[1]))

    def vector(self, one: Extracted) -> Float32:
        """Return the expert's vector."""
        return self._spool.read(one.left, one.change.shape)

    def part(
        self,
        name: str,
        shape: tuple[int, ...],
        *makes: Callable[[], Float32],
        dtype: str | None = None,
    ) -> AdapterPart:
        """Describe a tensor; its type is that of the factors where none is given."""
        return AdapterPart(ExtractedTensor(name, shape, dtype or self._dtype), makes)


class GgufParts(PartMaker):
    """Makes the tensors of a GGUF adapter."""

    def make(self, found: Sequence[Extracted]) -> tuple[list[AdapterPart], list[str]]:
        """Name the tensors as llama.cpp does."""
        parts, left_out = list[AdapterPart](), list[str]()
        stacks: dict[str, list[Extracted]] = defaultdict(list)
        for one in found:
            name, shape = one.change.name, one.change.shape
            if one.change.number is not None:
                stacks[name].append(one)
            elif not one.rank and name.endswith("_norm.weight"):
                parts.append(self.part(name, shape, partial(self.vector, one), dtype="F32"))
            elif not one.rank:
                left_out.append(name)
            else:
                parts += self.factors([one])
        for experts in stacks.values():
            parts += self.factors(experts)
        notes = []
        if left_out:
            notes.append(
                f"llama.cpp's adapters have no biases: the changes of {len(left_out)} vectors are left "
                f"out, such as that of {left_out[0]}"
            )
        if any(part.tensor.name.endswith("_norm.weight") for part in parts):
            notes.append("llama.cpp ignores the norms of an adapter; merging it takes them")
        names = {part.tensor.name for part in parts}
        is_tied = HEAD not in self._base.specs()
        if is_tied and f"{HEAD}.lora_a" in names:
            notes.append(
                "the expert has a head of its own, and the base has not: llama.cpp cannot add that with "
                "--lora; make a model of both, by edgemerge convert BASE+ADAPTER"
            )
        elif is_tied and f"{EMBEDDING}.lora_a" in names:
            notes.append(
                "the embedding changed, and it is the head too: llama.cpp cannot add that with --lora; "
                "make a model of both, by edgemerge convert BASE+ADAPTER"
            )
        return parts, notes

    def factors(self, found: Sequence[Extracted]) -> list[AdapterPart]:
        """Make the factors of one matrix, or of all experts of a stack."""
        if found[0].change.number is None:
            return self._gguf_pair(found[0])
        return self._gguf_stack(found[0].change.name, found)

    def _gguf_pair(self, one: Extracted) -> list[AdapterPart]:
        name, (n_rows, n_cols), rank = one.change.name, one.change.shape, one.rank
        if name == EMBEDDING:
            return [
                self.part(f"{name}.lora_a", (n_rows, rank), partial(self.left, one, rank)),
                self.part(f"{name}.lora_b", (n_cols, rank), lambda: self.right(one).T),
            ]
        return [
            self.part(f"{name}.lora_a", (rank, n_cols), partial(self.right, one)),
            self.part(f"{name}.lora_b", (n_rows, rank), partial(self.left, one, rank)),
        ]

    def _gguf_stack(self, name: str, experts: Sequence[Extracted]) -> list[AdapterPart]:
        """Stack experts, those without a change as zeros, all of the highest rank."""
        rank = max(one.rank for one in experts)
        count, (n_rows, n_cols) = experts[0].change.count, experts[0].change.shape
        changed = {one.change.number or 0: one for one in experts}

        def left(number: int) -> Float32:
            one = changed.get(number)
            return _with_zeros(None if one is None else self.left(one, rank), (n_rows, rank))

        def right(number: int) -> Float32:
            one = changed.get(number)
            return _with_zeros(None if one is None else self.right(one), (rank, n_cols))

        rights = [partial(right, number) for number in range(count)]
        lefts = [partial(left, number) for number in range(count)]
        return [
            self.part(f"{name}.lora_a", (count, rank, n_cols), *rights),
            self.part(f"{name}.lora_b", (count, n_rows, rank), *lefts),
        ]


def _with_zeros(values: Float32 | None, shape: tuple[int, int]) -> Float32:
    """Return values in the upper left corner of a matrix of that shape."""
    if values is not None and values.shape == shape:
        return values
    whole = np.zeros(shape, np.float32)
    if values is not None:
        whole[: values.shape[0], : values.shape[1]] = values
    return whole
