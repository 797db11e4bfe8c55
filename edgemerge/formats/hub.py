"""A Hugging Face directory of safetensors, seen through GGUF's eyes.

Nothing is converted ahead: tensors are renamed, the rows of q and k are read in GGUF's rotary order
straight from their places in the file, and the metadata is what llama.cpp's converter would write.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.architectures import (
    LLAMA_BLOCK,
    LLAMA_GLOBAL,
    ROTARY_HEADS,
    gguf_name,
    hf_name,
    is_ignored,
    layer_index,
)
from edgemerge.errors import FormatError
from edgemerge.formats.files import forget_range
from edgemerge.formats.hub_card import general_metadata
from edgemerge.formats.hub_config import read_config, rope_factors
from edgemerge.formats.json_file import read_object
from edgemerge.formats.safetensors import StoredTensor, read_header
from edgemerge.formats.tokenizer import tokenizer_metadata
from edgemerge.types import TensorSpec, UInt8

__all__ = ["HubModel", "is_hub_dir"]

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors -> ggml
ROPE_FREQS = "rope_freqs.weight"
IOV_MAX = os.sysconf("SC_IOV_MAX")


def is_hub_dir(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a directory that looks like a Hugging Face model or adapter."""
    return any((Path(path) / name).is_file() for name in (CONFIG, ADAPTER))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the bytes of one tensor are, and how its rows are ordered there."""

    shard: Path
    offset: int
    nbytes: int
    n_heads: int  # 0: rows lie as GGUF wants them; else the heads that cut the rotary order


class HubModel:
    """A directory with config.json, safetensors and a tokenizer as a `Source`.

    Raises
    ------
    FormatError
        The directory is incomplete, inconsistent, or of a kind that edgemerge does not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _refuse_folder(self.path)
        self._config = read_config(self.path / CONFIG)
        self.architecture = self._config.architecture
        self._places: dict[str, _Place] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._rope_freqs = self._add_rope_freqs()
        for shard, tensors in _stored_tensors(self.path).items():
            # By name within a shard, as llama.cpp's SafetensorsLocal lists them.
            for name, tensor in sorted(tensors.items()):
                self._add(shard, name, tensor)
        self._require_all()
        self._metadata: dict[str, bytes] | None = None
        self._fds: dict[Path, int] = {}
        for shard in dict.fromkeys(place.shard for place in self._places.values()):
            try:
                self._fds[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                self.close()
                raise FormatError(
                    f"cannot be opened ({e.strerror}); free it and start again", path=shard
                ) from e

    def _add_rope_freqs(self) -> UInt8 | None:
        factors = rope_factors(self._config)
        if factors is None:
            return None
        self._specs[ROPE_FREQS] = TensorSpec(ROPE_FREQS, factors.shape, "F32", factors.nbytes)
        return factors.astype("<f4").view(np.uint8)

    def _add(self, shard: Path, name: str, tensor: StoredTensor) -> None:
        """Check one stored tensor against config.json and file it under its GGUF name."""
        if is_ignored(name) or (name == LLAMA_GLOBAL["output.weight"] and self._config.tied):
            return
        new_name = gguf_name(name)
        layer = layer_index(new_name) if new_name is not None else None
        if new_name is None or (layer is not None and layer >= self._config.n_layers):
            raise FormatError(
                f"llama.cpp's {self.architecture} with {self._config.n_layers} layers has no such "
                "tensor; convert the model to GGUF with llama.cpp first",
                path=shard,
                tensor=name,
            )
        if tensor.dtype not in DTYPES:
            raise FormatError(
                f"its type {tensor.dtype} is not one of {', '.join(DTYPES)}; give the original "
                "fp16, bf16 or fp32 model",
                path=shard,
                tensor=name,
            )
        stem = new_name if layer is None else new_name.split(".", 2)[2]
        expected = self._config.expected_shape(stem)
        if tensor.shape != expected:
            raise FormatError(
                f"its shape is {list(tensor.shape)} but {CONFIG} makes it {list(expected)}; the "
                "two files belong to different models, get the directory again",
                path=shard,
                tensor=name,
            )
        heads = getattr(self._config, ROTARY_HEADS[stem]) if stem in ROTARY_HEADS else 0
        self._places[new_name] = _Place(shard, tensor.offset, tensor.nbytes, heads)
        self._specs[new_name] = TensorSpec(
            new_name, tensor.shape, DTYPES[tensor.dtype], tensor.nbytes
        )

    def _require_all(self) -> None:
        wanted = [n for n in LLAMA_GLOBAL if n != "output.weight" or not self._config.tied]
        for layer in range(self._config.n_layers):
            wanted += [f"blk.{layer}.{s}" for s in LLAMA_BLOCK if self._config.required(s)]
        for name in wanted:
            if name not in self._specs:
                raise FormatError(
                    "is missing from the directory; get its safetensors files again",
                    path=self.path,
                    tensor=hf_name(self.architecture, name),
                )

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name, in the order in which llama.cpp's converter lists them."""
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        """GGUF keys as llama.cpp's converter writes them, but those that depend on the output."""
        if self._metadata is None:
            n_params = sum(spec.n_elements for spec in self._specs.values())
            self._metadata = {
                **general_metadata(self.path, self.architecture, n_params),
                **self._config.metadata(),
                **tokenizer_metadata(self.path, self._config.raw, self._config.vocab_size),
            }
        return self._metadata

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` ((stop - start) * row_bytes,) with rows [start, stop) in GGUF's order."""
        spec = self._specs[name]
        assert 0 <= start <= stop <= spec.n_rows
        assert out_u8.nbytes == (stop - start) * spec.row_bytes
        if start == stop:
            return
        if name == ROPE_FREQS:
            assert self._rope_freqs is not None
            out_u8[:] = self._rope_freqs
            return
        place = self._places[name]
        view = out_u8.data.cast("B")
        if not place.n_heads:
            self._fill(name, [view], start * spec.row_bytes)
        elif len(spec.shape) > 1:
            self._fill_rotary(name, start, stop, spec.row_bytes, view)
        else:  # a bias is one row whose elements are permuted as the rows of its weight are
            self._fill_rotary(name, 0, spec.n_cols, spec.nbytes // spec.n_cols, view)

    def _fill_rotary(self, name: str, start: int, stop: int, width: int, view: memoryview) -> None:
        """Read items of `width` bytes: GGUF's item 2 i + p of a head is stored as item p hd/2 + i.

        So each head is two runs in the file, one per parity p, whose items go to every other place
        of the output: one vectored read per run, no buffer between.
        """
        half = self._config.head_dim // 2
        for head in range(start // (2 * half), (stop - 1) // (2 * half) + 1):
            first = head * 2 * half
            for parity in (0, 1):
                i_from = max(0, (start - first - parity + 1) // 2)
                i_to = min(half, (stop - first - parity + 1) // 2)
                if i_from >= i_to:
                    continue
                places = (first + 2 * i + parity - start for i in range(i_from, i_to))
                items = [view[at * width : (at + 1) * width] for at in places]
                self._fill(name, items, (first + parity * half + i_from) * width)

    def _fill(self, name: str, items: list[memoryview], offset: int) -> None:
        """Fill the buffers one after the other from the tensor's bytes at `offset`; thread-safe."""
        place = self._places[name]
        at = place.offset + offset
        while items:
            n_read = os.preadv(self._fds[place.shard], items[:IOV_MAX], at)
            if n_read == 0:
                raise FormatError(
                    "the file ended while it was read; it changed under the merge, start again",
                    path=place.shard,
                    tensor=hf_name(self.architecture, name),
                )
            at += n_read
            n_full = 0
            while n_full < len(items) and n_read >= len(items[n_full]):
                n_read -= len(items[n_full])
                n_full += 1
            items = items[n_full:]
            if n_read:
                items[0] = items[0][n_read:]

    def forget(self, name: str) -> None:
        """Tell the operating system that a tensor's pages will not be read again."""
        if place := self._places.get(name):
            forget_range(self._fds[place.shard], place.offset, place.nbytes)

    def close(self) -> None:
        """Close the shards."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def _refuse_folder(path: Path) -> None:
    """Refuse a folder that is no model."""
    if not is_hub_dir(path):
        raise FormatError(
            f"is no model folder: it has no {CONFIG}; give a GGUF file or a Hugging Face directory",
            path=path,
        )
    if (path / ADAPTER).is_file() and not (path / CONFIG).is_file():
        raise FormatError(
            "is a LoRA adapter, not a model; merge it into its base model and give the result",
            path=path,
        )


def _stored_tensors(path: Path) -> dict[Path, dict[str, StoredTensor]]:
    """Headers of all shards in the order of their names, checked against the index."""
    if (path / INDEX).is_file():
        return _read_shards(path)
    if (path / SINGLE).is_file():
        return {path / SINGLE: read_header(path / SINGLE)}
    if list(path.glob("model*.safetensors")):
        raise FormatError(f"has shards but no {INDEX}; get that file too", path=path)
    pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in path.glob(s))
    if pickles:
        raise FormatError(
            f"holds its weights as pickle only ({pickles[0]}), which is never read because it can "
            "run code; save the model as safetensors, or give a GGUF",
            path=path,
        )
    raise FormatError(
        f"has neither {SINGLE} nor {INDEX}; get one of them, or give a GGUF", path=path
    )


def _read_shards(path: Path) -> dict[Path, dict[str, StoredTensor]]:
    index = path / INDEX
    weight_map = _read_weight_map(index)
    shards: dict[Path, dict[str, StoredTensor]] = {}
    for shard_name in sorted(set(weight_map.values())):
        shard = path / shard_name
        if not shard.is_file():
            raise FormatError(f"shard {shard_name!r} is missing; get it too", path=path)
        shards[shard] = read_header(shard)
        for name in shards[shard]:
            if weight_map.get(name) != shard_name:
                raise FormatError(
                    f"is in this shard, but {INDEX} does not list it there; get both files again",
                    path=shard,
                    tensor=name,
                )
    for name, shard_name in weight_map.items():
        if name not in shards[path / shard_name]:
            raise FormatError(
                f"{INDEX} lists it in this shard, which does not hold it; get both files again",
                path=path / shard_name,
                tensor=name,
            )
    return shards


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map: Any = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("has no weight_map; get the file again", path=index)
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and "\0" not in shard
        if (
            not plain
            or shard != os.path.basename(shard)
            or len(shard.encode("utf-8", "replace")) > 255
        ):
            raise FormatError(
                f"its shard {str(shard)[:80]!r} is not a plain *.safetensors file name in the same "
                "directory; get the file again",
                path=index,
                tensor=name[:80],
            )
    return weight_map
