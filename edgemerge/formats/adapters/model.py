"""A model with LoRA adapters or deltas added, as a `Source`: rows of the base, and what is added to them.

The change is never formed as a whole matrix: a block's rows of B times A, added in float32. That is what
peft's `merge_and_unload` computes in float32, but for the order of additions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.formats.adapters.config import ADAPTER_CONFIG
from edgemerge.formats.adapters.delta import DeltaAdapter, is_delta
from edgemerge.formats.adapters.gguf import OBJECTS_BYTES, GgufAdapter
from edgemerge.formats.adapters.peft import PeftAdapter
from edgemerge.formats.adapters.updates import Scratch, Update
from edgemerge.formats.gguf.model import GgufFile
from edgemerge.formats.quants.codec import CODECS, find_codec
from edgemerge.formats.shared_tables import share_table
from edgemerge.types import FileState, Float32, Source, TensorSpec, UInt8

__all__ = ["AdaptedModel", "Adapter", "open_adapter"]

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
PLANNED_BYTES = 160  # what a plan and its results have of one tensor of one model
PIECE = 1 << 17  # elements of rows that are changed at a time; one row at least


class Adapter(Protocol):
    """An open adapter, fitted to a base."""

    path: Path

    def updates(self) -> Mapping[str, Sequence[Update]]:
        """List what it changes, by GGUF name."""

    def held_parts(self) -> Mapping[int, int]:
        """Return bytes in memory by the identity of what takes them: what several have alike counts once."""

    def notes(self) -> Sequence[str]:
        """Say what of the adapter is not used; one sentence each."""

    def states(self) -> Sequence[FileState]:
        """Return what its files were when they were opened."""

    def check_unchanged(self) -> None:
        """Raise FormatError where one of them was written to since."""

    def close(self) -> None:
        """Close the files."""


def open_adapter(path: Path, base: Source) -> Adapter:
    """Open a PEFT directory, a GGUF adapter or a delta, and fit it to an open base.

    Raises
    ------
    FormatError
        It is neither, or it is damaged, or of a kind that is not read.
    MismatchError
        It was made for another base.
    """
    if path.is_dir():
        if not (path / ADAPTER_CONFIG).is_file():
            raise FormatError(
                f"is no adapter: it has no {ADAPTER_CONFIG}; give a folder that PEFT saved, or a GGUF "
                "adapter",
                path=path,
            )
        return PeftAdapter(path, base)
    try:
        file = GgufFile(path)
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror}); check the path", path=path) from None
    return DeltaAdapter(file, base) if is_delta(file) else GgufAdapter(file, base)


class AdaptedModel:
    """A model with adapters as a `Source`.

    Tensors that an adapter changes are read as F32. `TensorSpec.like` is what the base keeps them in.

    Parameters
    ----------
    path : Path
        What the model is called: see `edgemerge.formats.adapters.reference`.
    base : Source
        Open.
    adapters : sequence of (Adapter, float)
        Open, and by how much the change of each is multiplied; closed with this.
    closes_base : bool
        Whether the base is closed with this too.
    """

    def __init__(
        self,
        path: Path,
        base: Source,
        adapters: Sequence[tuple[Adapter, float]],
        *,
        closes_base: bool,
    ) -> None:
        self.path, self.architecture = path, base.architecture
        self.base, self._closes_base = base, closes_base
        self._adapters = [adapter for adapter, _ in adapters]
        self._weights = [weight for _, weight in adapters]
        changed = dict.fromkeys(name for adapter in self._adapters for name in adapter.updates())
        self._homes: dict[str, str] = {}  # a head of its own, where the base's is its embedding
        specs = dict(base.specs())
        for name in changed:
            if name == OUTPUT and name not in specs:
                self._homes[name] = EMBEDDING
            spec = specs[self._homes.get(name, name)]
            self._refuse_factor(spec)
            find_codec(spec)
            like = spec.like or spec.dtype
            nbytes = 4 * spec.n_elements
            specs[name] = replace(spec, name=name, dtype="F32", nbytes=nbytes, like=like)
        self._specs = share_table(specs)
        self._threads = threading.local()

    def _refuse_factor(self, spec: TensorSpec) -> None:
        """Refuse a weight by whose factor llama.cpp multiplies it, the change of an adapter with it."""
        if self.architecture == "gemma4" and spec.dtype != "NVFP4":
            return  # what is called so there is a weight of its own
        if f"{spec.name.removesuffix('.weight')}.scale" in self.base.specs():
            raise FormatError(
                "has a factor beside it (NVFP4), which an adapter's change is not made for; get the base "
                "as F16, BF16 or F32",
                path=self.base.path,
                tensor=spec.name,
            )

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name, as the base lists them."""
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        """Return the base's."""
        return self.base.metadata()

    def notes(self) -> Sequence[str]:
        """Return the base's, and the adapters'."""
        notes = list(self.base.notes())
        for adapter in self._adapters:
            notes += adapter.notes()
        adapters = [adapter for adapter in self._adapters if EMBEDDING in adapter.updates()]
        if OUTPUT not in self._specs and not all(isinstance(a, DeltaAdapter) for a in adapters):
            notes.append(
                f"{self.path.name}: the base's head is its embedding, so what changes the one changes "
                "the other, as in peft's merge_and_unload"
            )
        if OUTPUT in self._homes:
            notes.append(f"{self.path.name}: the adapter gives the model a head of its own")
        return notes

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` with rows [start, stop): the base's bytes, or float32 of what adapters change."""
        if self.changes(name):
            self._read_changed(name, start, stop, None, out_u8)
        else:
            self.base.read_rows(name, start, stop, out_u8)

    def changes(self, name: str) -> bool:
        """Tell whether a tensor is another one than the base's."""
        return any(name in adapter.updates() for adapter in self._adapters)

    def _updates_of(self, name: str) -> list[tuple[int, float, Update]]:
        """List the updates of a tensor, each with the number and the weight of its adapter.

        An adapter that gives the model no head of its own changes the head as the embedding.
        """
        home, found = self._homes.get(name, name), list[tuple[int, float, Update]]()
        for number, adapter in enumerate(self._adapters):
            updates = adapter.updates()
            own = updates.get(name if name in updates else home, ())
            found += [(number, self._weights[number], update) for update in own]
        return found

    def _all_updates(self) -> Iterator[tuple[str, list[tuple[int, float, Update]]]]:
        names = dict.fromkeys(name for adapter in self._adapters for name in adapter.updates())
        return ((name, self._updates_of(name)) for name in names)

    def read_on_base(
        self, name: str, start: int, stop: int, base_f32: Float32, out_u8: UInt8
    ) -> None:
        """Do as `read_rows` of a tensor that changes; `base_f32` has these rows of the base, decoded."""
        self._read_changed(name, start, stop, base_f32, out_u8)

    def _read_changed(
        self, name: str, start: int, stop: int, base_f32: Float32 | None, out_u8: UInt8
    ) -> None:
        updates, spec = self._updates_of(name), self._specs[name]
        assert out_u8.nbytes == (stop - start) * spec.row_bytes
        values = out_u8.view(np.float32).reshape(stop - start, spec.n_cols)
        height = _height(spec)
        for first in range(start, stop, height):
            last = min(stop, first + height)
            piece = values[first - start : last - start]
            if base_f32 is None:
                self._read_base(name, first, last, piece)
            else:
                piece.reshape(-1)[:] = base_f32[(first - start) * spec.n_cols :][: piece.size]
            if len(spec.shape) > 1:
                self._change(updates, first, last, piece)
            else:  # a vector is one row; its elements are changed as rows of one column
                self._change(updates, 0, spec.n_cols, piece.reshape(spec.n_cols, 1))

    def _read_base(self, name: str, start: int, stop: int, out_f32: Float32) -> None:
        home = self._homes.get(name, name)
        spec = self.base.specs()[home]
        raw = np.empty((stop - start) * spec.row_bytes, np.uint8)
        self.base.read_rows(home, start, stop, raw)
        CODECS[spec.dtype].decode(raw, out_f32.reshape(-1))

    def _change(
        self,
        updates: Sequence[tuple[int, float, Update]],
        start: int,
        stop: int,
        out_f32: Float32,
    ) -> None:
        """Apply all updates to rows [start, stop) of a tensor, which hold the base's values."""
        scratch = self._scratch()
        # Each of several adapters changes the base itself, and their changes are added.
        is_alone = len({number for number, _, _ in updates}) == 1
        unchanged = out_f32.copy() if any(not u.is_sum for _, _, u in updates) else None
        for number, weight, update in updates:
            first = max(start, update.first)
            last = min(stop, update.first + update.n_rows)
            if first >= last:
                continue
            rows = out_f32[first - start : last - start]
            own = first - update.first, last - update.first
            if update.is_sum:
                update.apply(scratch, number, weight, *own, rows)
                continue
            assert unchanged is not None
            before = unchanged[first - start : last - start]
            changed = before.copy()
            update.apply(scratch, number, 1.0, *own, changed)
            if is_alone and weight == 1.0:
                rows[:] = changed
            else:
                rows += np.float32(weight) * (changed - before)

    def _scratch(self) -> Scratch:
        found: Scratch | None = getattr(self._threads, "scratch", None)
        if found is None:
            found = self._threads.scratch = Scratch()
        return found

    def work_bytes(self) -> int:
        """Bytes that a thread takes to read, beside what it reads into."""
        return self.kept_bytes() + self.passing_bytes()

    def kept_bytes(self) -> int:
        """Return those of them that stay from one read to the next: the last A of each adapter."""
        most = 0
        for _, updates in self._all_updates():
            rights = [0] * len(self._adapters)  # the widest A of each
            for number, _, update in updates:
                if update.change is not None:
                    right = update.change.right
                    rights[number] = max(rights[number], right.nbytes(right.shape[0]))
            most = max(most, sum(rights))
        return most

    def passing_bytes(self) -> int:
        """Return those of them that a read gives back."""
        most = 0
        for name, updates in self._all_updates():
            spec = self._specs[name]
            height = _height(spec)
            work = max(update.nbytes(height) for _, _, update in updates)
            copies = 2 * height * spec.row_bytes
            stored = height * self.base.specs()[self._homes.get(name, name)].row_bytes
            most = max(most, work + copies + stored)
        return most

    def held_parts(self) -> Mapping[int, int]:
        """Bytes that all threads take to know what is changed, by the identity of what takes them."""
        n = len(self._specs)
        parts = {id(self): PLANNED_BYTES * n, id(self._specs): OBJECTS_BYTES * n}
        for adapter in self._adapters:
            parts |= adapter.held_parts()
        return parts

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Drop pages of the base from the page cache; an adapter's are few."""
        self.base.forget(self._homes.get(name, name), n_rows)

    def states(self) -> Sequence[FileState]:
        """Return what the files were when they were opened."""
        return [*self.base.states(), *(s for adapter in self._adapters for s in adapter.states())]

    def check_unchanged(self) -> None:
        """Raise FormatError where a file was written to since it was opened."""
        self.base.check_unchanged()
        for adapter in self._adapters:
            adapter.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        if self._closes_base:
            self.base.close()
        for adapter in self._adapters:
            adapter.close()


def _height(spec: TensorSpec) -> int:
    """Rows of a tensor that are changed at a time."""
    return min(spec.n_rows, max(1, PIECE // max(1, spec.n_cols)))
