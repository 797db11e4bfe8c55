"""The files of an adapter to be: a PEFT directory's two, or a GGUF adapter's one."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemerge.formats.adapters.names import BaseNames, Target
from edgemerge.formats.architectures import KINDS_OF_MODEL, hf_name, layer_index
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.types import Source, TensorSpec

__all__ = ["AdapterLayout", "ExtractedTensor", "find_module", "gguf_layout", "peft_config"]
__all__ += ["peft_layout"]

EMBEDDING = "token_embd.weight"
SAFETENSORS = {"F32": "F32", "F16": "F16"}


@dataclass(frozen=True, slots=True)
class ExtractedTensor:
    """One tensor of an adapter, under the name that it has in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # ggml type name

    @property
    def spec(self) -> TensorSpec:
        """The tensor as GGUF describes it."""
        spec = TensorSpec(self.name, self.shape, self.dtype, 0)
        size = {"F32": 4, "F16": 2}[self.dtype]
        return TensorSpec(self.name, self.shape, self.dtype, size * spec.n_elements)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Header bytes, the position of each tensor by name, and the size of a file."""

    header: bytes
    offsets: Mapping[str, int]
    n_bytes: int


def peft_layout(tensors: Sequence[ExtractedTensor]) -> AdapterLayout:
    """Lay out adapter_model.safetensors."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    relative, at = {}, 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        size = tensor.spec.nbytes
        table[tensor.name] = {
            "dtype": SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        relative[tensor.name] = at
        at += size
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    header = struct.pack("<Q", len(raw)) + raw
    offsets = {name: len(header) + offset for name, offset in relative.items()}
    return AdapterLayout(header, offsets, len(header) + at)


def gguf_layout(tensors: Sequence[ExtractedTensor], base: Source, alpha: float) -> AdapterLayout:
    """Lay out a GGUF adapter, with the keys of llama.cpp's convert_lora_to_gguf.py."""
    metadata = {
        "general.architecture": encode_value(base.architecture, "str"),
        "general.type": encode_value("adapter", "str"),
        "adapter.type": encode_value("lora", "str"),
        "general.base_model.count": encode_value(1, "u32"),
        "general.base_model.0.name": encode_value(base.path.name, "str"),
        "adapter.lora.alpha": encode_value(alpha, "f32"),
    }
    layout = make_layout(metadata, [tensor.spec for tensor in tensors])
    return AdapterLayout(layout.header, layout.offsets, layout.n_bytes)


def peft_config(
    base: Source, ranks: Mapping[str, int], saved: Sequence[str], alpha: float, *, has_bias: bool
) -> bytes:
    """Write adapter_config.json.

    Parameters
    ----------
    base : Source
        What the adapter is for.
    ranks : mapping of str to int
        Rank of each module, by its Hugging Face name.
    saved : sequence of str
        Modules whose weights are saved whole.
    alpha : float
        For all modules.
    has_bias : bool
        Whether biases are saved.
    """
    highest = max(ranks.values(), default=1)
    config = {
        "base_model_name_or_path": base.path.name,
        "bias": "lora_only" if has_bias else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": highest,
        "rank_pattern": {m: rank for m, rank in sorted(ranks.items()) if rank != highest},
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def find_module(
    base: Source, names: BaseNames, name: str, expert: int | None = None
) -> tuple[str, Target] | None:
    """Find the weight or bias of Hugging Face that a GGUF tensor is, or an expert of one.

    Parameters
    ----------
    base : Source
        Open.
    names : BaseNames
        Of it.
    name : str
        GGUF's.
    expert : int, optional
        Which one of a stack.

    Returns
    -------
    (str, Target) or None
        Its name, and how GGUF's rows came from it, or from some of its rows. None where no name is known
        that leads back to it.
    """
    for found in _stored_names(base.architecture, names.kinds, name, expert):
        for target in names.find(found):
            if target.name == name:
                return found, target
    return None


def _stored_names(
    architecture: str, kinds: Sequence[str], name: str, expert: int | None
) -> Iterator[str]:
    """Yield what a tensor may be called in Hugging Face, alone or with another one."""
    layer = layer_index(name)
    stem = name if layer is None else name.split(".", 2)[2]
    for family in (KINDS_OF_MODEL[kind] for kind in kinds):
        table = family.outside if layer is None else family.block
        if expert is not None:
            table = {gguf: hf.format(expert) for gguf, hf in family.experts.items()}
        elif layer is not None:
            table = {gguf: hf for hf, both in family.halves.items() for gguf in both} | {**table}
        if (found := table.get(stem)) is not None:
            yield found if layer is None else f"model.layers.{layer}.{found}"
    if not kinds and expert is None and (usual := hf_name(architecture, name)) is not None:
        yield usual
