"""A Hugging Face directory of safetensors, seen through GGUF's eyes.

Nothing is converted ahead. Tensors are renamed. The rows of q and k are read from the file in GGUF's rotary
order. Experts are read one after the other, as if they were one tensor. The metadata is what llama.cpp's
converter would write.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.finding.cache import folder_name
from edgemerge.formats.architectures import GLOBAL, hf_name
from edgemerge.formats.byte_file import ByteFile, open_file
from edgemerge.formats.gguf.types import row_bytes
from edgemerge.formats.hub.card import general_metadata
from edgemerge.formats.hub.changes import as_f32
from edgemerge.formats.hub.claims import read_claims
from edgemerge.formats.hub.config import EMBEDDING, OUTPUT, HubConfig, read_config
from edgemerge.formats.hub.files import (
    ADAPTER,
    CONFIG,
    refuse_folder,
    stored_tensors,
    unread_files,
)
from edgemerge.formats.hub.inventory import Inventory
from edgemerge.formats.hub.layouts import Start
from edgemerge.formats.hub.names import name_some
from edgemerge.formats.hub.rope import rope_tensors
from edgemerge.formats.hub.safetensors import read_metadata
from edgemerge.formats.tokenizer.process import read_tokenizer
from edgemerge.types import FileState, Float32, TensorSpec, UInt8

__all__ = ["HubModel"]

PIECE = 1 << 18  # bytes of rows that are compared or changed at a time; one row at least


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
        self._specs: dict[str, TensorSpec] = {}
        self._computed: dict[str, UInt8] = {}
        for name, values in rope_tensors(self._config.rope).items():
            self._specs[name] = TensorSpec(name, values.shape, "F32", values.nbytes)
            self._computed[name] = values.astype("<f4").view(np.uint8)
        inventory = Inventory(self._config, stored_tensors(self.path))
        if (lacking := inventory.missing()) is not None:
            raise FormatError(
                "is missing from the directory; get its safetensors files again",
                path=self.path,
                tensor=lacking,
            )
        self._places = inventory.places
        self._specs |= inventory.specs
        self._notes = self._list_notes(inventory)
        self._metadata: dict[str, bytes] | None = None
        self._files: dict[Path, ByteFile] = {}
        for shard in dict.fromkeys(self._shards()):
            try:
                self._files[shard] = open_file(shard)
            except OSError as e:
                self.close()
                raise FormatError(
                    f"cannot be opened ({e.strerror}); free it and start again", path=shard
                ) from e
        try:
            self._settle_head(inventory)
        except BaseException:
            self.close()
            raise

    def _shards(self) -> Iterator[Path]:
        for name, spec in self.stored_specs().items():
            for (shard, _), _ in self._places[name].layout.stored(spec, spec.n_rows):
                yield shard

    def _list_notes(self, inventory: Inventory) -> list[str]:
        name, tool, unused = folder_name(self.path), self._config.quantised, inventory.unused
        notes = [note] if (note := unread_files(self.path)) else []
        if (self.path / ADAPTER).is_file():
            notes.append(
                f"{name}: a LoRA adapter lies beside the weights and is not added to them; give "
                f"{name}+{name} to add it"
            )
        if unused:
            notes.append(
                f"{name}: tensors that the language model does not use are left out: {name_some(unused)}"
            )
        if inventory.blank:
            notes.append(
                f"{name}: zeros are written for tensors that llama.cpp wants but does not use: "
                f"{name_some(inventory.blank)}"
            )
        if tool and not inventory.packed.is_used:
            notes.append(
                f"{name}: {CONFIG} says that the weights are quantised by {tool!r}, but they are "
                "plain, and read as such"
            )
        return notes

    def _settle_head(self, inventory: Inventory) -> None:
        """Keep a stored head that is not the embedding, whatever config.json says of tying.

        So do transformers and llama.cpp, which ties where no head is stored. Some architectures have it
        in one way only.
        """
        tied, must_tie, name = self._config.tied, self._config.must_tie, folder_name(self.path)
        if OUTPUT in self._places and (tied or must_tie):
            if self._is_embedding():
                del self._places[OUTPUT], self._specs[OUTPUT]
            elif must_tie:
                raise FormatError(
                    f"differs from the embedding, but llama.cpp's {self.architecture} has no other "
                    "head; this model cannot be converted",
                    path=self.path,
                    tensor=GLOBAL[OUTPUT],
                )
            else:
                self._notes.append(
                    f"{name}: {CONFIG} ties the output head to the embedding, but another one is "
                    "stored, and kept"
                )
        elif OUTPUT not in self._places and not tied and not must_tie:
            self._notes.append(
                f"{name}: {CONFIG} says that the output head is not the embedding, but none is "
                "stored; the embedding is used"
            )
        if OUTPUT not in self._places and must_tie is False:
            self._specs[OUTPUT] = inventory.tie_head()

    def _is_embedding(self) -> bool:
        """Tell whether the stored head has the embedding's values; reads both as far as they agree."""
        n_rows = self._specs[OUTPUT].n_rows
        height = max(1, PIECE // self._specs[OUTPUT].row_bytes)
        same = True
        for start in range(0, n_rows, height):
            stop = min(n_rows, start + height)
            left, right = (self._read_stored(name, start, stop) for name in (EMBEDDING, OUTPUT))
            if not np.array_equal(left, right):
                same = False
                break
        for name in (EMBEDDING, OUTPUT):
            self.forget(name)
        return same

    def _read_stored(self, name: str, start: int, stop: int) -> Float32:
        raw_u8 = np.empty((stop - start) * self._stored_spec(name).row_bytes, np.uint8)
        self.read_stored(name, start, stop, raw_u8)
        return as_f32(raw_u8, self._places[name].dtype)

    @property
    def config(self) -> HubConfig:
        """What its config.json says."""
        return self._config

    @property
    def repeats_embedding(self) -> bool:
        """Whether it lists its embedding as a head too, as llama.cpp has no other way for some families."""
        head = self._places.get(OUTPUT)
        return head is not None and head.layout == self._places[EMBEDDING].layout

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name, in the order in which llama.cpp's converter lists them."""
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        """GGUF keys as llama.cpp's converter writes them, but those that depend on the output."""
        if self._metadata is None:
            self._metadata = {
                **general_metadata(self.path, self.architecture, self._specs.values()),
                **self._config.metadata(),
                **self._tokenizer(),
                **self._claims(),
            }
        return self._metadata

    def _tokenizer(self) -> dict[str, bytes]:
        config, notes = self._config, list[str]()
        found = read_tokenizer(
            self.path, config.raw, config.vocab_size, config.model_type, notes=notes
        )
        self._notes += [f"{folder_name(self.path)}: {note}" for note in notes]
        return found

    def _claims(self) -> dict[str, bytes]:
        """Read what the first file of weights says of a merge that made it."""
        first = min(self._files)
        return read_claims(read_metadata(first), self.stored_specs())

    def stored_specs(self) -> Mapping[str, TensorSpec]:
        """All tensors that are stored, by GGUF name, with the type that they have in the file."""
        return {
            name: self._stored_spec(name)
            for name in self._specs
            if (place := self._places.get(name)) is not None and not place.is_blank
        }

    def _stored_spec(self, name: str) -> TensorSpec:
        spec, dtype = self._specs[name], self._places[name].dtype
        return replace(spec, dtype=dtype, nbytes=spec.n_rows * row_bytes(dtype, spec.n_cols))

    def read_stored(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` with rows [start, stop) in GGUF's order, as the file has their values."""
        spec, fill = self._stored_spec(name), partial(self._fill, name)
        self._places[name].layout.read(spec, start, stop, out_u8, fill)

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` ((stop - start) * row_bytes,) with rows [start, stop) in GGUF's order."""
        spec = self._specs[name]
        assert 0 <= start <= stop <= spec.n_rows
        assert out_u8.nbytes == (stop - start) * spec.row_bytes
        if start == stop:
            return
        if name in self._computed:
            out_u8[:] = self._computed[name]
        elif (change := self._places[name].change) is None:
            self.read_stored(name, start, stop, out_u8)
        else:
            out = out_u8.view("<f4").reshape(-1, spec.n_cols)
            height = max(1, PIECE // self._stored_spec(name).row_bytes)
            for first in range(start, stop, height):
                last = min(stop, first + height)
                rows = out[first - start : last - start]
                rows[:] = self._read_stored(name, first, last).reshape(rows.shape)
                change.apply(rows, first)

    def _fill(self, name: str, items: list[memoryview], place: Start) -> None:
        """Fill the buffers one after the other from an offset in a shard; thread-safe."""
        shard, at = place
        file = self._files[shard]
        run = self._find_run(name, place) if file.work_bytes else None
        file.fill(items, at, hf_name(self.architecture, name), run)

    def _find_run(self, name: str, place: Start) -> tuple[int, int] | None:
        """Find what of a tensor lies in one piece around a place: the bytes that are read next."""
        spec, (shard, at) = self._stored_spec(name), place
        for start, n_bytes in self._places[name].layout.stored(spec, spec.n_rows):
            if start[0] == shard and start[1] <= at < start[1] + n_bytes:
                return start[1], start[1] + n_bytes
        return None

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Drop a tensor's pages, or its first rows', from the page cache, unless the shard was in it."""
        if place := self._places.get(name):
            spec = self._stored_spec(name)
            for (shard, offset), n_bytes in place.layout.stored(spec, n_rows or spec.n_rows):
                self._files[shard].forget(offset, n_bytes)

    def states(self) -> Sequence[FileState]:
        """Return what the shards were when they were opened."""
        return [file.state for file in self._files.values()]

    def check_unchanged(self) -> None:
        """Raise FormatError where a shard was written to since it was opened."""
        for file in self._files.values():
            file.check_unchanged()

    def notes(self) -> Sequence[str]:
        """Say what of the directory is not used or was read otherwise than it says; reads its tokenizer."""
        self.metadata()
        return self._notes

    def work_bytes(self) -> int:
        """Bytes that each thread takes to read rows: of files on this machine none."""
        return max((file.work_bytes for file in self._files.values()), default=0)

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            self._files.popitem()[1].close()
