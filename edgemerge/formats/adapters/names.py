"""Which rows of a base's tensors a module of Hugging Face is, whatever file the base is in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from edgemerge.errors import FormatError
from edgemerge.formats.adapters.expert_parameters import Stacks
from edgemerge.formats.adapters.factors import Factor, StoredMatrix
from edgemerge.formats.adapters.forms import AS_STORED, BaseForm, Order
from edgemerge.formats.architectures import (
    KINDS_OF_MODEL,
    ROTARY_HEADS,
    expert_name,
    gguf_name,
    half_names,
    hf_name,
    layer_index,
    split_layer,
)
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.hub.changes import Change, Scaled
from edgemerge.formats.hub.cuts import Cut, Stored
from edgemerge.formats.hub.names import own_name
from edgemerge.types import Source, TensorSpec

__all__ = ["BaseNames", "Target"]

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Architectures without a family here, whose q and k llama.cpp's converter puts into rotary order too.
ROTATED = {
    "afmoe",
    "arcee",
    "arctic",
    "bailingmoe",
    "chameleon",
    "deci",
    "deepseek",
    "internlm2",
    "llada",
}
ROTATED |= {"llama-embed", "minicpm", "nanbeige", "olmo", "xverse"}
IN_ROWS = (".ssm_norm.weight", ".ssm_a", ".ssm_d")
# Conv1D modules of GPT-2, whose weights GGUF keeps like those of linear modules.
GPT2 = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
}
GPT2_GLOBAL = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}


class Target(NamedTuple):
    """Rows of a base's tensor; of a vector, its elements."""

    name: str  # GGUF's
    first: int
    n_rows: int
    stored_row: int  # row of the module's weight where they begin
    n_stored: int  # rows of the module's weight
    order: Order
    change: Change | None  # of the module's values, which makes them GGUF's
    is_lost: bool = False  # whether nobody knows how GGUF's values came from the module's

    @property
    def factors(self) -> Scaled | None:
        """What the rows of a change are multiplied by."""
        return self.change if isinstance(self.change, Scaled) else None

    def matrix_shape(self, stored: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a stored tensor as a matrix: a filter is a row, a vector a column.

        A vector of Mamba-2 is as `wanted`, in rows as in GGUF, where it has as many elements.
        """
        if len(stored) == 1:
            is_in_rows = self.name.endswith(IN_ROWS) and prod(stored) == prod(wanted)
            return tuple(wanted) if is_in_rows else (*stored, 1)
        return (stored[0], stored[2]) if len(stored) == 3 and stored[1] == 1 else tuple(stored)

    def replacement(self, matrix: StoredMatrix) -> Factor:
        """Return what stands for the rows, of all rows that stand for the module's."""
        shape = self.n_rows, matrix.shape[1]
        return Factor(matrix, shape, self.stored_row, order=self.order, change=self.change)

    def addend(self, matrix: StoredMatrix) -> Factor:
        """Return what belongs to the rows of B, of LoRA's own bias or of DoRA's norms."""
        order = AS_STORED if self.order.places else self.order
        shape = self.n_rows, matrix.shape[1]
        return Factor(matrix, shape, self.stored_row, order=order, change=self.factors)


class BaseNames:
    """The names of an open base.

    `deals_in_turn`: whether gate and up of all experts are stored as one in turn, not one above the other.
    """

    def __init__(self, base: Source) -> None:
        self._base = base
        self._specs = base.specs()
        self._form = BaseForm(base)
        families = [KINDS_OF_MODEL[kind] for kind in self._form.kinds]
        self.deals_in_turn = any(family.deals_in_turn for family in families)
        self._rotates = base.architecture in ROTATED
        self._rotates |= any(family.rotates_pairs for family in families)
        self._others: dict[str, str] = {}
        if not families:
            for name in self._specs:
                self._others[_other_name(base.architecture, name) or name] = name

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the base may be, as keys of `KINDS_OF_MODEL`."""
        return self._form.kinds

    @property
    def repeats_embedding(self) -> bool:
        """Whether the base is a directory that lists its embedding as a head too."""
        return self._form.repeats_embedding

    def find(self, stored: str) -> tuple[Target, ...]:
        """Find the rows that a weight or bias is, by its name in a file; none where the base lacks it."""
        for kind in self._form.kinds or ("llama",):
            name = own_name(kind, stored)
            if name is None:
                continue
            if targets := self._find(kind, name):
                return targets
        return ()

    def _find(self, kind: str, name: str) -> tuple[Target, ...]:
        if not self._form.kinds:
            return self._whole(self._others.get(name, ""))
        layer, hf_stem = split_layer(name)
        if (stored := self._form.cut(layer, hf_stem)) is not None:
            return self._cut("" if layer is None else f"blk.{layer}.", stored)
        if halves := half_names(kind, name):
            both = [target for half in halves for target in self._whole(half)]
            if len(both) < 2:
                return ()
            n_rows = both[0].n_rows + both[1].n_rows
            first, second = (target._replace(n_stored=n_rows) for target in both)
            return first, second._replace(stored_row=first.n_rows)
        if (expert := expert_name(kind, name)) is not None:
            return self._expert(*expert)
        own = gguf_name(kind, name) or ""
        if own == EMBEDDING and self._form.repeats_embedding:
            return self._whole(own) + self._whole(OUTPUT)
        return self._whole(own)

    def _whole(self, name: str) -> tuple[Target, ...]:
        spec = self.spec(name)
        if spec is None:
            return ()
        n_rows = spec.n_cols if len(spec.shape) == 1 else spec.n_rows
        order = Order(half=self._half(name, n_rows))
        return (self._target(name, 0, n_rows, 0, n_rows, order),)

    def _expert(self, name: str, number: int) -> tuple[Target, ...]:
        spec = self.spec(name)
        if spec is None or len(spec.shape) != 3 or number >= spec.shape[0]:
            return ()
        n_rows = spec.shape[1]
        return (self._target(name, number * n_rows, n_rows, 0, n_rows, AS_STORED),)

    def _cut(self, front: str, stored: Stored) -> tuple[Target, ...]:
        """Return what a tensor is cut into; none where the base lacks a part."""
        targets = []
        for cut in stored.cuts:
            name = front + cut.stem
            spec = self.spec(name)
            if spec is None:
                return ()
            if spec.shape != cut.shape:
                raise FormatError(
                    f"is {list(spec.shape)}, and by the counts that the model states "
                    f"{list(cut.shape)}; convert the model anew",
                    path=self._base.path,
                    tensor=name,
                )
            n_rows = len(cut.starts) * cut.height
            first = stored.member[0] * n_rows
            order = _order(cut)
            row = 0 if order.starts else cut.starts[0]
            targets.append(self._target(name, first, n_rows, row, stored.shape[0], order))
        return tuple(targets)

    def _target(
        self, name: str, first: int, n_rows: int, row: int, n_stored: int, order: Order
    ) -> Target:
        stem = _stem(name)
        change, is_lost = self._form.change(stem), self._form.is_lost(stem)
        return Target(name, first, n_rows, row, n_stored, order, change, is_lost)

    def spec(self, name: str) -> TensorSpec | None:
        """Return a tensor of the base; the head of a tied one is its embedding."""
        if name == OUTPUT and name not in self._specs:
            return self._specs.get(EMBEDDING)
        return self._specs.get(name)

    def stacks(self, stored: str) -> Stacks | None:
        """Return the stacks of a module that holds all experts of a layer in one parameter each."""
        for kind in self._form.kinds:
            name = own_name(kind, f"{stored}.0.weight")
            layer = name.split(".")[2] if name and name.startswith("model.layers.") else None
            if name is None or layer is None or not name.endswith(".experts.0.weight"):
                continue
            names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
            shapes = [self._specs[name].shape for name in names if name in self._specs]
            if len(shapes) < 3 or len(shapes[0]) != 3:
                continue
            n_experts, n_inner, n_outer = shapes[0]
            if shapes[1:] == [shapes[0], (n_experts, n_outer, n_inner)]:
                return Stacks(names[0], names[1], names[2], (n_experts, n_inner, n_outer))
        return None

    def is_called(self, wanted: str) -> bool:
        """Tell whether one of the base's names is part of a given one, or the other way round."""
        metadata, path = self._base.metadata(), self._base.path.resolve()
        stated = [get_value(metadata, f"general.{key}") for key in ("name", "basename")]
        names = [path.stem, path.name, path.parent.name]
        names += [name for name in stated if isinstance(name, str)]
        own = _plain(wanted.rstrip("/").rpartition("/")[2])
        return any(name and (name in own or own in name) for name in map(_plain, names))

    def _half(self, name: str, n_rows: int) -> int:
        """Return half the rows of a head, where the rows of a tensor are in rotary order; else 0."""
        stem = _stem(name)
        if not self._rotates or stem not in ROTARY_HEADS:
            return 0
        key = {"n_head": "head_count", "n_kv_head": "head_count_kv"}[ROTARY_HEADS[stem]]
        metadata, prefix = self._base.metadata(), f"{self._base.architecture}.attention"
        heads = get_value(metadata, f"{prefix}.{key}")
        if heads is None:
            heads = get_value(metadata, f"{prefix}.head_count")
        if isinstance(heads, Array):  # one number per layer
            layer = layer_index(name) or 0
            heads = heads[layer] if layer < len(heads) else None
        if not isinstance(heads, int) or heads <= 0 or n_rows % (2 * heads):
            raise FormatError(
                f"states no {prefix}.{key} that divides {name}; convert the model anew",
                path=self._base.path,
            )
        return n_rows // heads // 2


def _stem(name: str) -> str:
    return name.split(".", 2)[2] if layer_index(name) is not None else name


def _order(cut: Cut) -> Order:
    if cut.columns:
        return Order(places=cut.columns)
    return Order(starts=cut.starts, height=cut.height) if len(cut.starts) > 1 else AS_STORED


def _plain(name: str) -> str:
    """Leave of a model's name what its spellings have in common."""
    name = re.sub(r"[-_.](bnb|4bit|8bit|gptq|awq|gguf)\b", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", name)


def _other_name(architecture: str, name: str) -> str | None:
    """Return the usual Hugging Face name of a tensor of an architecture without a family."""
    if architecture != "gpt2":
        return hf_name(architecture, name)
    layer = layer_index(name)
    if layer is None:
        return GPT2_GLOBAL.get(name)
    stem, _, suffix = name.split(".", 2)[2].rpartition(".")
    return f"transformer.h.{layer}.{GPT2[stem]}.{suffix}" if stem in GPT2 else None
