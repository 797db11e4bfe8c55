"""Writes what was extracted: a PEFT directory, or a GGUF adapter."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgemerge.errors import MismatchError, OutputError
from edgemerge.formats.adapters.config import ADAPTER_CONFIG
from edgemerge.formats.adapters.layout import (
    AdapterLayout,
    ExtractedTensor,
    gguf_layout,
    module_name,
    peft_config,
    peft_layout,
)
from edgemerge.formats.adapters.names import BaseNames
from edgemerge.formats.adapters.peft import WEIGHTS
from edgemerge.output.file import OutputFile, finishing, sync_folder
from edgemerge.planning.differences import Change
from edgemerge.types import Float32, Source, UInt8

__all__ = ["AdapterPart", "Extracted", "Spool", "encode_part", "factor_parts", "output_paths"]
__all__ += ["write_adapter", "write_peft"]

EMBEDDING, HEAD, FRONT = "token_embd.weight", "output.weight", "base_model.model."


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
            raw = self._file.read(4 * int(np.prod(shape)))
        return np.frombuffer(raw, np.float32).reshape(shape)


@dataclass(frozen=True, slots=True)
class Extracted:
    """What is kept of one change: where its factors are in the spool, or the expert's whole vector."""

    change: Change
    rank: int  # 0: a vector
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """A tensor of the adapter, and what makes it."""

    tensor: ExtractedTensor
    make: Callable[[], Float32]


def output_paths(output: Path) -> tuple[Path, ...]:
    """Return the files that an adapter of that name will be."""
    if output.suffix == ".gguf":
        return (output,)
    return output / WEIGHTS, output / ADAPTER_CONFIG


def write_adapter(
    output: Path, base: Source, found: Sequence[Extracted], spool: Spool, dtype: str
) -> list[str]:
    """Write an adapter.

    Parameters
    ----------
    output : Path
        A file for llama.cpp where it ends in .gguf, else a directory for PEFT.
    base : Source
        What the adapter is for.
    found : sequence of Extracted
        In the order of the base's tensors.
    spool : Spool
        Where the factors are.
    dtype : str
        F32 or F16.

    Returns
    -------
    list of str
        A sentence for each change that the adapter cannot have.

    Raises
    ------
    OutputError
        The files cannot be written; then there is none of them.
    MismatchError
        A matrix has no name that PEFT would find.
    """
    alpha = float(max((one.rank for one in found), default=1) or 1)
    writer = _Writer(base, spool, dtype, alpha)
    if output.suffix == ".gguf":
        parts, notes = writer.gguf_parts(found)
        tensors = [part.tensor for part in parts]
        layout = gguf_layout(tensors, base, alpha)
        with OutputFile(output, layout.n_bytes) as file:
            _fill(file, layout, parts)
            file.publish()
        return notes
    parts, config, notes = writer.peft_parts(found)
    write_peft(output, parts, config)
    return notes


def write_peft(output: Path, parts: Sequence[AdapterPart], config: bytes) -> None:
    """Write a PEFT directory: adapter_config.json last, without which it is no adapter.

    An adapter that is replaced stays whole until both files are on the disk. Its adapter_config.json goes
    before its weights do: at no time are one's weights beside the other's ranks.

    Raises
    ------
    OutputError
        The files cannot be written; what was there is as it was, unless the last step failed.
    """
    layout, settings = peft_layout([part.tensor for part in parts]), output / ADAPTER_CONFIG
    with ExitStack() as stack:
        if not output.exists():
            output.mkdir()
            stack.callback(_remove_empty, output)
        with (
            OutputFile(output / WEIGHTS, layout.n_bytes) as weights_file,
            OutputFile(settings, len(config)) as settings_file,
        ):
            _fill(weights_file, layout, parts)
            settings_file.write(config, 0)
            weights_file.sync()
            settings_file.sync()
            with finishing(output):
                settings.unlink(missing_ok=True)
                sync_folder(output)
            weights_file.rename()
            settings_file.rename()
        stack.pop_all()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _fill(file: OutputFile, layout: AdapterLayout, parts: Sequence[AdapterPart]) -> None:
    file.write(layout.header, 0)
    for part in parts:
        file.write(encode_part(part), layout.offsets[part.tensor.name])


def encode_part(part: AdapterPart) -> UInt8:
    """Make a tensor of an adapter, as it is stored.

    Raises
    ------
    MismatchError
        A value is larger than the type holds.
    """
    values = part.make()
    assert values.shape == part.tensor.shape
    stored = np.dtype({"F32": "<f4", "F16": "<f2"}[part.tensor.dtype])
    with np.errstate(over="ignore"):
        raw = np.ascontiguousarray(values).astype(stored, copy=False)
    if not np.isfinite(raw).all():
        remedy = "smaller weights" if stored.itemsize == 4 else "--type F32, or smaller weights"
        raise MismatchError(
            f"{part.tensor.name!r} reaches numbers that {part.tensor.dtype} cannot hold; give {remedy}",
            tensor=part.tensor.name,
        )
    return raw.view(np.uint8).reshape(-1)


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
    return _Writer(base, spool, dtype, alpha).factors(found)


class _Writer:
    """Makes the tensors of an adapter."""

    def __init__(self, base: Source, spool: Spool, dtype: str, alpha: float) -> None:
        self._base, self._names = base, BaseNames(base)
        self._spool, self._dtype, self._alpha = spool, dtype, alpha

    def _left(self, one: Extracted, rank: int) -> Float32:
        """Return (n_rows, rank), scaled so that alpha / rank undoes it, with zeros up to the rank."""
        left = self._spool.read(one.left, (one.change.shape[0], one.rank))
        left = left * np.float32(rank / self._alpha)
        return np.pad(left, ((0, 0), (0, rank - one.rank)))

    def _right(self, one: Extracted, rank: int) -> Float32:
        right = self._spool.read(one.right, (one.rank, one.change.shape[1]))
        return np.pad(right, ((0, rank - one.rank), (0, 0)))

    def _vector(self, one: Extracted) -> Float32:
        return self._spool.read(one.left, one.change.shape)

    def _part(
        self,
        name: str,
        shape: tuple[int, ...],
        make: Callable[[], Float32],
        dtype: str | None = None,
    ) -> AdapterPart:
        return AdapterPart(ExtractedTensor(name, shape, dtype or self._dtype), make)

    # -- GGUF ------------------------------------------------------------------------------------

    def gguf_parts(self, found: Sequence[Extracted]) -> tuple[list[AdapterPart], list[str]]:
        """Name the tensors as llama.cpp does."""
        parts, left_out = list[AdapterPart](), list[str]()
        stacks: dict[str, list[Extracted]] = defaultdict(list)
        for one in found:
            name, shape = one.change.name, one.change.shape
            if one.change.number is not None:
                stacks[name].append(one)
            elif not one.rank and name.endswith("_norm.weight"):
                parts.append(self._part(name, shape, partial(self._vector, one), "F32"))
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
        if f"{EMBEDDING}.lora_a" in {part.tensor.name for part in parts} and (
            HEAD not in self._base.specs()
        ):
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
                self._part(f"{name}.lora_a", (n_rows, rank), lambda: self._left(one, rank)),
                self._part(f"{name}.lora_b", (n_cols, rank), lambda: self._right(one, rank).T),
            ]
        return [
            self._part(f"{name}.lora_a", (rank, n_cols), lambda: self._right(one, rank)),
            self._part(f"{name}.lora_b", (n_rows, rank), lambda: self._left(one, rank)),
        ]

    def _gguf_stack(self, name: str, experts: Sequence[Extracted]) -> list[AdapterPart]:
        """Stack experts, those without a change as zeros, all of the highest rank."""
        rank = max(one.rank for one in experts)
        count, (n_rows, n_cols) = experts[0].change.count, experts[0].change.shape

        def stack(shape: tuple[int, int], read: Callable[[Extracted, int], Float32]) -> Float32:
            values = np.zeros((count, *shape), np.float32)
            for one in experts:
                values[one.change.number or 0] = read(one, rank)
            return values

        return [
            self._part(
                f"{name}.lora_a",
                (count, rank, n_cols),
                lambda: stack((rank, n_cols), self._right),
            ),
            self._part(
                f"{name}.lora_b",
                (count, n_rows, rank),
                lambda: stack((n_rows, rank), self._left),
            ),
        ]

    # -- PEFT ------------------------------------------------------------------------------------

    def peft_parts(self, found: Sequence[Extracted]) -> tuple[list[AdapterPart], bytes, list[str]]:
        """Name the tensors as PEFT does, and write adapter_config.json."""
        parts, ranks, saved, left_out = (
            list[AdapterPart](),
            dict[str, int](),
            list[str](),
            list[str](),
        )
        has_bias = False
        for one in found:
            if one.rank:
                module = self._module(one)
                ranks[module] = one.rank
                parts += self._peft_pair(one, module)
        for one in found:
            if one.rank:
                continue
            module = self._module(one)
            is_bias = one.change.name.endswith(".bias")
            if is_bias and module not in ranks:
                left_out.append(module)
                continue
            has_bias |= is_bias
            if not is_bias:
                saved.append(module)
            end = "base_layer.bias" if is_bias else "weight"
            make = self._hub_vector(one)
            parts.append(self._part(f"{FRONT}{module}.{end}", one.change.shape, make, "F32"))
        notes = []
        if left_out:
            notes.append(
                f"PEFT saves biases of changed matrices only: those of {len(left_out)} others are left "
                f"out, such as that of {left_out[0]}"
            )
        config = peft_config(self._base, ranks, saved, self._alpha, has_bias=has_bias)
        return parts, config, notes

    def _module(self, one: Extracted) -> str:
        module = module_name(self._base, one.change.name, one.change.number)
        if module is None:
            raise MismatchError(
                f"tensor {one.change.name!r} of {self._base.path} has no name that PEFT would find it by; "
                "write a GGUF adapter (-o NAME.gguf)",
                tensor=one.change.name,
            )
        return module

    def _peft_pair(self, one: Extracted, module: str) -> list[AdapterPart]:
        name, (n_rows, n_cols), rank = f"{FRONT}{module}", one.change.shape, one.rank
        if one.change.name == EMBEDDING:
            name += ".lora_embedding_"
            return [
                self._part(f"{name}A", (rank, n_rows), lambda: self._left(one, rank).T),
                self._part(f"{name}B", (n_cols, rank), lambda: self._right(one, rank).T),
            ]
        half = self._names.half(one.change.name, n_rows)
        name += ".lora_"
        return [
            self._part(f"{name}A.weight", (rank, n_cols), lambda: self._right(one, rank)),
            self._part(
                f"{name}B.weight",
                (n_rows, rank),
                lambda: _stored_order(self._left(one, rank), half),
            ),
        ]

    def _hub_vector(self, one: Extracted) -> Callable[[], Float32]:
        name, length = one.change.name, one.change.shape[0]
        half, offset = self._names.half(name, length), self._names.norm_offset(name)

        def make() -> Float32:
            values = _stored_order(self._vector(one).reshape(-1, 1), half).reshape(-1)
            return values - np.float32(offset)

        return make


def _stored_order(rows: Float32, half: int) -> Float32:
    """Put rows of GGUF's rotary order into that of Hugging Face; `half` as of `Factor`."""
    if not half:
        return rows
    heads = rows.reshape(-1, half, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)
