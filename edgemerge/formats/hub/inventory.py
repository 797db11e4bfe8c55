"""Where each tensor of a Hugging Face directory lies, by its GGUF name, checked against config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.architectures import (
    ROTARY_HEADS,
    column_names,
    expert_name,
    gguf_name,
    half_names,
    layer_index,
    split_layer,
)
from edgemerge.formats.hub.changes import Change
from edgemerge.formats.hub.config import EMBEDDING, OUTPUT, HubConfig
from edgemerge.formats.hub.cuts import Cut
from edgemerge.formats.hub.layouts import BLOCK, Groups, Layout, Rotary, Rows
from edgemerge.formats.hub.names import is_adapter, is_packed, is_unused, own_name
from edgemerge.formats.hub.safetensors import DTYPE_BITS, StoredTensor
from edgemerge.formats.hub.stacks import PackedStacks, dealt_columns, halve
from edgemerge.formats.hub.tensor_checker import DTYPES, TensorChecker
from edgemerge.types import TensorSpec

__all__ = ["Inventory", "Place"]


@dataclass(frozen=True, slots=True)
class _Expert:
    """One matrix of one expert, before all of its layer are found."""

    shard: Path
    name: str
    tensor: StoredTensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of one tensor are, and what they become."""

    layout: Layout
    dtype: str  # as stored
    change: Change | None = None  # of the values, which makes them float32; None: they are GGUF's

    @property
    def is_blank(self) -> bool:
        """Whether it is nothing but zeros, which no file has."""
        return isinstance(self.layout, Rows) and not self.layout.parts


class Inventory:
    """All tensors of a directory.

    Parameters
    ----------
    config : HubConfig
        Its config.json.
    stored : mapping
        File of weights -> the tensors in it.

    Raises
    ------
    FormatError
        A tensor is of another shape or type than config.json makes it, or none of the model's.
    """

    def __init__(
        self, config: HubConfig, stored: Mapping[Path, Mapping[str, StoredTensor]]
    ) -> None:
        self.places: dict[str, Place] = {}
        self.specs: dict[str, TensorSpec] = {}  # in the order in which the converter lists them
        self.unused: list[str] = []  # stored names of what inference does without
        self.packed = PackedStacks()
        self._config, self._checker = config, TensorChecker(config)
        # Matrices of stacks begun, by GGUF name
        self._members: dict[str, dict[int, tuple[Path, StoredTensor]]] = {}
        self._experts: dict[int, dict[str, dict[int, _Expert]]] = {}  # of layers begun, by stem
        found: dict[str, str] = {}  # transformers' name -> stored name
        for shard, tensors in stored.items():
            # By name within a shard, as llama.cpp's SafetensorsLocal lists them.
            for stored_name, tensor in sorted(tensors.items()):
                name = own_name(config.kind, stored_name)
                if name is None:
                    self.unused.append(stored_name)
                    continue
                if name in found:
                    raise FormatError(
                        f"is {found[name]} under another name; remove one of the two",
                        path=shard,
                        tensor=stored_name,
                    )
                self._add(shard, name, stored_name, tensor)
                found[name] = stored_name
                if stack := self.packed.stack_name(name):
                    found.setdefault(stack, stored_name)
        # stored names of what llama.cpp wants, but does not use
        self.blank = self._fill_blanks(found)
        self._found = found
        if self.packed.is_used:  # the converter lists them first
            self.specs = dict(sorted(self.specs.items(), key=lambda item: item[1].dtype != "MXFP4"))

    def tie_head(self) -> TensorSpec:
        """File the embedding as the head too, and return its specification."""
        shard, tensor = self._embedding
        self._file(OUTPUT, OUTPUT, shard, tensor)
        return self.specs[OUTPUT]

    def _add(self, shard: Path, name: str, stored_name: str, tensor: StoredTensor) -> None:
        """Check one stored tensor against config.json and file it under its GGUF name."""
        if is_unused(name, tensor.dtype):
            self.unused.append(stored_name)
            return
        if is_packed(name):
            raise self._checker.packed(shard, stored_name, "a part of a packed weight")
        if is_adapter(name):
            raise FormatError(
                "belongs to a LoRA; merge it into its base model first (merge_and_unload() of peft)",
                path=shard,
                tensor=stored_name,
            )
        if self._cut(shard, name, stored_name, tensor):
            return
        if halves := half_names(self._config.kind, name):
            for half, own in zip(halve(tensor), halves, strict=True):
                self._place(shard, stored_name, half, own, 2 * half.nbytes)
            return
        if owners := column_names(self._config.kind, name):
            self._deal_out(shard, stored_name, tensor, owners)
            return
        stack = self.packed.stack_name(name)
        if stack and (owners := column_names(self._config.kind, stack)):
            self._unpack(shard, stored_name, tensor, name, owners)
            return
        expert = expert_name(self._config.kind, name)
        new_name, number = expert or (gguf_name(self._config.kind, name), 0)
        if new_name is None or (expert is not None and number >= self._config.n_experts):
            raise self._checker.unknown(shard, stored_name)
        if expert is None:
            self._place(shard, stored_name, tensor, new_name)
            return
        layer, stem = self._find_layer(shard, stored_name, new_name)
        assert layer is not None
        self._checker.check(shard, stored_name, tensor, stem)
        found = _Expert(shard, stored_name, tensor)
        self._experts.setdefault(layer, {}).setdefault(stem, {})[number] = found
        self._stack(layer)

    def _cut(self, shard: Path, name: str, stored_name: str, tensor: StoredTensor) -> bool:
        """File what a family makes of a tensor by rules of its own; tell whether it has some."""
        layer, hf_stem = split_layer(name)
        stored = self._config.cuts(layer).get(hf_stem)
        if stored is None:
            return False
        if not stored.cuts:
            self.unused.append(stored_name)
        for cut in stored.cuts:
            own = cut.stem if layer is None else f"blk.{layer}.{cut.stem}"
            _, stem = self._find_layer(shard, stored_name, own)
            if layer is not None and self._config.lacks(layer, stem):
                raise self._checker.unknown(shard, stored_name)
            self._checker.check(shard, stored_name, tensor, stem, stored.shape)
            if stored.member[1] > 1:
                self._gather(own, cut, stored.member, shard, stored_name, tensor)
            else:
                self._file_cut(own, cut, shard, tensor)
        return True

    def _gather(
        self,
        name: str,
        cut: Cut,
        member: tuple[int, int],
        shard: Path,
        stored_name: str,
        tensor: StoredTensor,
    ) -> None:
        """Join one of several with the others, when the last of them has come."""
        i, n = member
        parts = self._members.setdefault(name, {})
        parts[i] = shard, tensor
        if any(part.dtype != tensor.dtype for _, part in parts.values()):
            raise FormatError(
                f"its type is {tensor.dtype}, not that of others of its kind; save the model in one type",
                path=shard,
                tensor=stored_name,
            )
        if len(parts) == n:
            starts = tuple((home, part.offset) for home, part in (parts[j] for j in range(n)))
            self._put(name, cut.stem, cut.shape, Rows(starts, tensor.nbytes), tensor.dtype)

    def _fill_blanks(self, found: dict[str, str]) -> list[str]:
        """File zeros for what may be missing; add it to what was found, and return its names."""
        blank: list[str] = []
        if EMBEDDING not in self.places:
            return blank  # and refuse it
        for layer in range(self._config.n_layers):
            for hf_stem, stored in self._config.cuts(layer).items():
                name = f"model.layers.{layer}.{hf_stem}"
                if not stored.may_lack or name in found:
                    continue
                own, dtype = f"blk.{layer}.{stored.cuts[0].stem}", self._embedding[1].dtype
                nbytes = prod(stored.shape) * DTYPE_BITS[dtype] // 8
                self.places[own] = Place(Rows((), nbytes), DTYPES[dtype])
                self.specs[own] = TensorSpec(own, stored.shape, DTYPES[dtype], nbytes)
                found[name] = name
                blank.append(name)
        return blank

    def _file_cut(self, name: str, cut: Cut, shard: Path, tensor: StoredTensor) -> None:
        n_rows = tensor.shape[0] if len(tensor.shape) == 1 else prod(tensor.shape[:-1])
        n_bytes, start = tensor.nbytes // n_rows, (shard, tensor.offset)
        layout: Layout = Groups(start, cut.columns)
        if not cut.columns:
            parts = tuple((shard, tensor.offset + first * n_bytes) for first in cut.starts)
            layout = Rows(parts, cut.height * n_bytes)
        self._put(name, cut.stem, cut.shape, layout, tensor.dtype)

    def _place(
        self, shard: Path, stored_name: str, tensor: StoredTensor, name: str, whole: int = 0
    ) -> None:
        """Check a tensor, and file it under its GGUF name; `whole`: bytes of what it is the half of."""
        stem = self._own_stem(shard, stored_name, name)
        if stem == "shortconv.conv.weight" and len(tensor.shape) == 3 and tensor.shape[1] == 1:
            tensor = replace(tensor, shape=tensor.shape[::2])  # one filter for each channel
        self._checker.check(shard, stored_name, tensor, stem)
        if name == EMBEDDING:
            self._embedding = shard, tensor
        tensor = replace(tensor, shape=self._config.shapes.in_gguf.get(stem, tensor.shape))
        self._file(name, stem, shard, tensor, whole)

    def _deal_out(
        self, shard: Path, stored_name: str, tensor: StoredTensor, owners: tuple[str, ...]
    ) -> None:
        """Check a stack of transposed matrices or biases, and file what its columns are."""
        n, in_turn = len(owners), self._config.family.deals_in_turn
        for i, name in enumerate(owners):
            stem = self._own_stem(shard, stored_name, name)
            n_experts, n_out, *inputs = shape = self._config.expected_shape(stem)
            self._checker.check(shard, stored_name, tensor, stem, (n_experts, *inputs, n * n_out))
            start = (shard, tensor.offset)
            layout = dealt_columns(start, DTYPES[tensor.dtype], shape, i, n, in_turn=in_turn)
            self._put(name, stem, shape, layout, tensor.dtype)

    def _unpack(
        self,
        shard: Path,
        stored_name: str,
        tensor: StoredTensor,
        name: str,
        owners: tuple[str, ...],
    ) -> None:
        """Check a part of packed experts, and file them when both parts are there."""
        stems = [self._own_stem(shard, stored_name, owner) for owner in owners]
        shape = self._config.expected_shape(stems[0])
        self.packed.check(shard, stored_name, tensor, shape, len(owners))
        n_bytes = prod(shape) // BLOCK * (1 + BLOCK // 2)
        layouts = self.packed.pair(name, shard, tensor, len(owners))
        for owner, layout in zip(owners, layouts, strict=False):
            self.places[owner] = Place(layout, "MXFP4")
            self.specs[owner] = TensorSpec(owner, shape, "MXFP4", n_bytes)

    def _own_stem(self, shard: Path, stored_name: str, name: str) -> str:
        """Return a GGUF name without its layer; refuse what is filed already, or not of such a layer."""
        layer, stem = self._find_layer(shard, stored_name, name)
        if layer is not None and self._config.lacks(layer, stem):
            raise self._checker.unknown(shard, stored_name)
        if name in self.places:
            raise FormatError(
                "is there both packed and plain; remove one of the two",
                path=shard,
                tensor=stored_name,
            )
        return stem

    def _find_layer(self, shard: Path, stored_name: str, name: str) -> tuple[int | None, str]:
        """Return a tensor's layer, and its name without it."""
        layer = layer_index(name)
        if layer is None:
            return None, name
        if layer >= self._config.n_layers:
            raise self._checker.unknown(shard, stored_name)
        return layer, name.split(".", 2)[2]

    def _file(
        self, name: str, stem: str, shard: Path, tensor: StoredTensor, whole: int = 0
    ) -> None:
        family, start = self._config.family, (shard, tensor.offset)
        layout: Layout = Rows((start,), tensor.nbytes)
        if family.rotates_pairs and stem in ROTARY_HEADS:
            layout = Rotary(start, self._config.head_dim, tensor.nbytes // tensor.shape[0])
        elif whole and len(tensor.shape) > 2:  # half of each expert
            n, step = tensor.shape[0], whole // tensor.shape[0]
            parts = tuple((shard, tensor.offset + i * step) for i in range(n))
            layout = Rows(parts, tensor.nbytes // n)
        self._put(name, stem, tensor.shape, layout, tensor.dtype)

    def _put(
        self, name: str, stem: str, shape: tuple[int, ...], layout: Layout, stored_dtype: str
    ) -> None:
        """File a tensor, which is float32 where its values are not those that are stored."""
        change = self._config.change(stem)
        self.places[name] = Place(layout, DTYPES[stored_dtype], change)
        dtype = "F32" if change else stored_dtype
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        self.specs[name] = TensorSpec(name, shape, DTYPES[dtype], nbytes)

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
            self._put(name, stem, (n_experts, *first.shape), Rows(parts, first.nbytes), first.dtype)
        del self._experts[layer]

    def missing(self) -> str | None:
        """Return Hugging Face's name of a tensor that is not there; None: all are."""
        config, family = self._config, self._config.family

        def wanted() -> Iterator[str]:  # one by one: a hostile config.json has billions of layers
            yield from (hf for name, hf in family.outside.items() if name != "output.weight")
            yield from config.cuts(None)
            names = {stem: hf for stem, hf in family.block.items() if config.required(stem)}
            names |= {stems[0]: hf for hf, stems in {**family.halves, **family.columns}.items()}
            for layer in range(config.n_layers):
                for stem, hf in names.items():
                    if not config.lacks(layer, stem):
                        yield f"model.layers.{layer}.{hf}"
                if all(f"blk.{layer}.{stem}" in self.specs for stem in family.experts):
                    continue  # there are none, or all of a layer are stored as one
                for i in range(config.n_experts):
                    for hf in family.experts.values():
                        yield f"model.layers.{layer}.{hf.format(i)}"

        names = chain(wanted(), filter(None, [self.packed.missing()]))
        return next((name for name in names if name not in self._found), None)
