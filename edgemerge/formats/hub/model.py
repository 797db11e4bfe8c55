"""A Hugging Face directory of safetensors, seen through GGUF's eyes.

Nothing is converted ahead: tensors are renamed, the rows of q and k are read in GGUF's rotary order
straight from their places in the file, experts one after the other as if they were one tensor, and
the metadata is what llama.cpp's converter would write.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.formats.architectures import (
    GLOBAL,
    ROTARY_HEADS,
    expert_name,
    gguf_name,
    hf_name,
    is_ignored,
    layer_index,
    text_name,
)
from edgemerge.formats.files import (
    check_unchanged,
    fill_buffers,
    forget_range,
    read_state,
    was_cached,
)
from edgemerge.formats.hub.card import general_metadata
from edgemerge.formats.hub.config import read_config
from edgemerge.formats.hub.files import CONFIG, refuse_folder, stored_tensors
from edgemerge.formats.hub.rope import rope_tensors
from edgemerge.formats.hub.safetensors import StoredTensor
from edgemerge.formats.tokenizer.process import read_tokenizer
from edgemerge.types import FileState, Float32, TensorSpec, UInt8

__all__ = ["HubModel"]

DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors -> ggml
OUTPUT = GLOBAL["output.weight"]


@dataclass(frozen=True, slots=True)
class _Expert:
    """One matrix of one expert, before all of its layer are found."""

    shard: Path
    name: str
    tensor: StoredTensor


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the bytes of one tensor are, and what they become.

    Its parts, the experts of a stack or else one, are of equal size and follow one another.
    """

    parts: tuple[tuple[Path, int], ...]  # shard, offset in it
    part_bytes: int
    dtype: str  # as stored
    n_heads: int = 0  # 0: rows lie as GGUF wants them; else the heads that cut the rotary order
    norm_offset: float = 0.0  # 0: the bytes are passed on; else added, which makes it float32


class HubModel:
    """A directory with config.json, safetensors and a tokenizer as a `Source`.

    Raises
    ------
    FormatError
        The directory is incomplete, inconsistent, or of a kind that edgemerge does not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        refuse_folder(self.path)
        self._config = read_config(self.path / CONFIG)
        self.architecture = self._config.family.architecture
        self._places: dict[str, _Place] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._computed: dict[str, UInt8] = {}
        for name, values in rope_tensors(self._config.rope).items():
            self._specs[name] = TensorSpec(name, values.shape, "F32", values.nbytes)
            self._computed[name] = values.astype("<f4").view(np.uint8)
        self._experts: dict[int, dict[str, dict[int, _Expert]]] = {}  # of layers begun, by stem
        found: set[str] = set()
        for shard, tensors in stored_tensors(self.path).items():
            # By name within a shard, as llama.cpp's SafetensorsLocal lists them.
            for stored_name, tensor in sorted(tensors.items()):
                own_name = text_name(stored_name) if self._config.wrapped else stored_name
                if own_name is not None:
                    self._add(shard, own_name, stored_name, tensor)
                    found.add(own_name)
        self._require_all(found)
        self._metadata: dict[str, bytes] | None = None
        self._fds: dict[Path, int] = {}
        shards = (shard for place in self._places.values() for shard, _ in place.parts)
        for shard in dict.fromkeys(shards):
            try:
                self._fds[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                self.close()
                raise FormatError(
                    f"cannot be opened ({e.strerror}); free it and start again", path=shard
                ) from e
        self._states = {shard: read_state(fd, shard) for shard, fd in self._fds.items()}
        self._stay_cached = {shard for shard, fd in self._fds.items() if was_cached(fd)}

    def _add(self, shard: Path, name: str, stored_name: str, tensor: StoredTensor) -> None:
        """Check one stored tensor against config.json and file it under its GGUF name."""
        if is_ignored(name) or (name == OUTPUT and self._config.tied):
            return
        expert = expert_name(self._config.model_type, name)
        new_name, number = expert or (gguf_name(self._config.model_type, name), 0)
        layer = layer_index(new_name) if new_name is not None else None
        if (
            new_name is None
            or (layer is not None and layer >= self._config.n_layers)
            or (expert is not None and number >= self._config.n_experts)
        ):
            raise FormatError(
                f"llama.cpp's {self.architecture} with {self._config.n_layers} layers has no such "
                "tensor; convert the model to GGUF with llama.cpp first",
                path=shard,
                tensor=stored_name,
            )
        stem = new_name if layer is None else new_name.split(".", 2)[2]
        self._check(shard, stored_name, tensor, stem)
        if expert is None:
            self._file(new_name, stem, shard, tensor)
        elif layer is not None:
            found = _Expert(shard, stored_name, tensor)
            self._experts.setdefault(layer, {}).setdefault(stem, {})[number] = found
            self._stack(layer)

    def _check(self, shard: Path, stored_name: str, tensor: StoredTensor, stem: str) -> None:
        if tensor.dtype not in DTYPES:
            raise FormatError(
                f"its type {tensor.dtype} is not one of {', '.join(DTYPES)}; give the original "
                "fp16, bf16 or fp32 model",
                path=shard,
                tensor=stored_name,
            )
        expected = self._config.expected_shape(stem)
        if tensor.shape != expected:
            raise FormatError(
                f"its shape is {list(tensor.shape)} but {CONFIG} makes it {list(expected)}; the "
                "two files belong to different models, get the directory again",
                path=shard,
                tensor=stored_name,
            )

    def _file(self, name: str, stem: str, shard: Path, tensor: StoredTensor) -> None:
        family = self._config.family
        heads = 0
        if family.rotates_pairs and stem in ROTARY_HEADS:
            heads = getattr(self._config, ROTARY_HEADS[stem])
        offset = family.norm_offset if stem.endswith("norm.weight") else 0.0
        dtype = DTYPES[tensor.dtype]
        parts = ((shard, tensor.offset),)
        self._places[name] = _Place(parts, tensor.nbytes, dtype, heads, offset)
        if offset:
            self._specs[name] = TensorSpec(name, tensor.shape, "F32", 4 * prod(tensor.shape))
        else:
            self._specs[name] = TensorSpec(name, tensor.shape, dtype, tensor.nbytes)

    def _stack(self, layer: int) -> None:
        """File a layer's experts when the last of them has come, as the converter does."""
        stacks = self._experts[layer]
        n_experts, stems = self._config.n_experts, self._config.family.experts
        if any(len(stacks.get(stem, ())) < n_experts for stem in stems):
            return
        for stem in stems:
            experts = [stacks[stem][i] for i in range(n_experts)]
            first = experts[0].tensor
            for expert in experts:
                if expert.tensor.dtype != first.dtype:
                    raise FormatError(
                        f"its type is {expert.tensor.dtype}, that of the layer's first expert "
                        f"{first.dtype}; save the model in one type",
                        path=expert.shard,
                        tensor=expert.name,
                    )
            name = f"blk.{layer}.{stem}"
            parts = tuple((expert.shard, expert.tensor.offset) for expert in experts)
            dtype = DTYPES[first.dtype]
            self._places[name] = _Place(parts, first.nbytes, dtype)
            shape = (n_experts, *first.shape)
            self._specs[name] = TensorSpec(name, shape, dtype, n_experts * first.nbytes)
        del self._experts[layer]

    def _require_all(self, found: set[str]) -> None:
        """Refuse a directory that lacks a tensor; names are Hugging Face's."""
        config, family = self._config, self._config.family

        def wanted() -> Iterator[str]:  # one by one: a hostile config.json has billions of layers
            yield from (name for name in GLOBAL.values() if name != OUTPUT or not config.tied)
            names = [hf for stem, hf in family.block.items() if config.required(stem)]
            for layer in range(config.n_layers):
                yield from (f"model.layers.{layer}.{name}" for name in names)
                for i in range(config.n_experts):
                    for hf in family.experts.values():
                        yield f"model.layers.{layer}.{hf.format(i)}"

        for name in wanted():
            if name not in found:
                raise FormatError(
                    "is missing from the directory; get its safetensors files again",
                    path=self.path,
                    tensor=name,
                )

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name, in the order in which llama.cpp's converter lists them."""
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        """GGUF keys as llama.cpp's converter writes them, but those that depend on the output."""
        if self._metadata is None:
            self._metadata = {
                **general_metadata(self.path, self.architecture, self._specs.values()),
                **self._config.metadata(),
                **read_tokenizer(
                    self.path, self._config.raw, self._config.vocab_size, self._config.model_type
                ),
            }
        return self._metadata

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` ((stop - start) * row_bytes,) with rows [start, stop) in GGUF's order."""
        spec = self._specs[name]
        assert 0 <= start <= stop <= spec.n_rows
        assert out_u8.nbytes == (stop - start) * spec.row_bytes
        if start == stop:
            return
        if name in self._computed:
            out_u8[:] = self._computed[name]
            return
        place = self._places[name]
        view = out_u8.data.cast("B")
        if place.norm_offset:
            out_u8[:] = self._read_norm(name, place).view(np.uint8)
        elif not place.n_heads:
            self._fill_rows(name, start * spec.row_bytes, stop * spec.row_bytes, view)
        elif len(spec.shape) > 1:
            self._fill_rotary(name, start, stop, spec.row_bytes, view)
        else:  # a bias is one row whose elements are permuted as the rows of its weight are
            self._fill_rotary(name, 0, spec.n_cols, spec.nbytes // spec.n_cols, view)

    def _read_norm(self, name: str, place: _Place) -> Float32:
        """Return the vector that Gemma multiplies by: it stores them less 1."""
        stored = np.empty(place.part_bytes, np.uint8)
        self._fill(name, [stored.data.cast("B")], place.parts[0])
        match place.dtype:
            case "BF16":
                values = (stored.view("<u2").astype("<u4") << 16).view("<f4")
            case "F16":
                values = stored.view("<f2").astype("<f4")
            case _:
                values = stored.view("<f4")
        return values + np.float32(place.norm_offset)

    def _fill_rows(self, name: str, start: int, stop: int, view: memoryview) -> None:
        """Read bytes [start, stop) of a tensor, whose parts may lie apart."""
        place = self._places[name]
        at = start
        while at < stop:
            part, offset = divmod(at, place.part_bytes)
            end = min(stop, (part + 1) * place.part_bytes)
            shard, first = place.parts[part]
            self._fill(name, [view[at - start : end - start]], (shard, first + offset))
            at = end

    def _fill_rotary(self, name: str, start: int, stop: int, width: int, view: memoryview) -> None:
        """Read items of `width` bytes: GGUF's item 2 i + p of a head is stored as item p hd/2 + i.

        So each head is two runs in the file, one per parity p, whose items go to every other place
        of the output: one vectored read per run, no buffer between.
        """
        half = self._config.head_dim // 2
        shard, offset = self._places[name].parts[0]
        for head in range(start // (2 * half), (stop - 1) // (2 * half) + 1):
            first = head * 2 * half
            for parity in (0, 1):
                i_from = max(0, (start - first - parity + 1) // 2)
                i_to = min(half, (stop - first - parity + 1) // 2)
                if i_from >= i_to:
                    continue
                places = (first + 2 * i + parity - start for i in range(i_from, i_to))
                items = [view[at * width : (at + 1) * width] for at in places]
                run = offset + (first + parity * half + i_from) * width
                self._fill(name, items, (shard, run))

    def _fill(self, name: str, items: list[memoryview], place: tuple[Path, int]) -> None:
        """Fill the buffers one after the other from an offset in a shard; thread-safe."""
        shard, at = place
        fill_buffers(self._fds[shard], items, at, shard, hf_name(self.architecture, name))

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Drop a tensor's pages, or its first rows', from the page cache, unless the shard was in it."""
        if place := self._places.get(name):
            spec = self._specs[name]
            left = spec.nbytes if n_rows is None else n_rows * spec.row_bytes
            for shard, offset in place.parts:
                if shard not in self._stay_cached:
                    forget_range(self._fds[shard], offset, min(left, place.part_bytes))
                left = max(0, left - place.part_bytes)

    def states(self) -> Sequence[FileState]:
        """Return what the shards were when they were opened."""
        return list(self._states.values())

    def check_unchanged(self) -> None:
        """Raise FormatError where a shard was written to since it was opened."""
        for shard, state in self._states.items():
            check_unchanged(self._fds[shard], state)

    def close(self) -> None:
        """Close the shards."""
        while self._fds:
            os.close(self._fds.popitem()[1])
