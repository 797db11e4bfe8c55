"""config.json of a model that is a GGUF: made of its metadata, then read back and compared with that.

GGUF states less than config.json, and several model types are one architecture to it. So each of them is
tried. A configuration counts if `edgemerge.formats.hub.config` makes the same metadata of it. Whatever the
tables here do not know is refused by its key's name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.architectures import KINDS_OF_MODEL, layer_index
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.hub.config import MAX_LAYERS, HubConfig, check_config
from edgemerge.formats.hub.families import READERS
from edgemerge.formats.hub.granite import GRANITE_SCALES
from edgemerge.formats.hub.made_rope import make_rope
from edgemerge.formats.hub.own_values import KEYS, OWN, own_rope
from edgemerge.formats.hub.stated import REMEDY, Json, ReadF32, Stated
from edgemerge.types import TensorSpec

__all__ = ["make_config"]

# GGUF's key without the architecture's name -> config.json's
PLAIN = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "shortconv.l_cache": "conv_L_cache",
    **GRANITE_SCALES,
}
TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# What some converters write and the arithmetic does not need, or what is compared otherwise.
IGNORED = ("vocab_size", "rope.dimension_count", "tensor_data_layout", "rope.scaling.finetuned")
_MISSHAPEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)


def make_config(
    path: Path,
    metadata: Mapping[str, bytes],
    specs: Mapping[str, TensorSpec],
    read_f32: ReadF32,
) -> HubConfig:
    """Make the configuration of a GGUF model.

    Parameters
    ----------
    path : Path
        The model, named in errors.
    metadata : mapping of GGUF key to typed value
        Its own.
    specs : mapping of str to TensorSpec
        Its tensors by GGUF name.
    read_f32 : ReadF32
        Reads small tensors, or some rows of large ones.

    Raises
    ------
    FormatError
        No directory of the model types that edgemerge reads holds this model.
    """
    stated = Stated(path, metadata, specs, read_f32)
    has_experts = bool(stated.get("expert_count"))
    types = _find_types(stated.name, has_experts=has_experts)
    if not types:
        raise FormatError(
            f"is a model of the architecture {stated.name!r}{' with experts' * has_experts}, of which "
            f"no directory can be made; {REMEDY}",
            path=path,
        )
    n_layers = stated.get("block_count")
    if not isinstance(n_layers, int) or n_layers > MAX_LAYERS:
        raise stated.refuse(f"its block_count is {str(n_layers)[:40]}")
    refusals = []
    for model_type in types:
        try:
            return _make(stated, model_type)
        except FormatError as error:
            refusals.append(error)
        except (
            _MISSHAPEN
        ) as error:  # a key is missing, or of another type than any converter writes
            what = f"{type(error).__name__}: {str(error)[:60]}"
            refusals.append(
                stated.refuse(f"as {model_type}, its keys do not fit together ({what})")
            )
    raise refusals[0]


def _find_types(architecture: str, *, has_experts: bool) -> list[str]:
    """List the model types that are of this architecture in one of their forms."""
    found = []
    for kind, family in KINDS_OF_MODEL.items():
        model_type, *parts = kind.split("+")
        are_experts = READERS[model_type].experts is not None or "experts" in parts
        if family.architecture == architecture and are_experts == has_experts:
            found.append(model_type)
    return list(dict.fromkeys(found))


def _make(stated: Stated, model_type: str) -> HubConfig:
    reader = READERS[model_type]
    raw: Json = {"architectures": [reader.classes[0]], "model_type": model_type}
    for key, name in (PLAIN | KEYS.get(model_type, {})).items():
        if (value := stated.get(key)) is not None:
            raw[name] = max(value, default=0) if isinstance(value, list) else value
    raw[reader.activation[0]] = reader.activation[1]
    if (eps := stated.get("attention.layer_norm_rms_epsilon")) is not None:
        raw[reader.eps_key] = eps
    if reader.experts is not None:
        raw[reader.experts[0][0]] = stated.get("expert_count")
        raw[reader.experts[1]] = stated.get("expert_used_count")
    embedding = stated.specs.get("token_embd.weight")
    raw["vocab_size"] = embedding.n_rows if embedding is not None else None
    raw |= {name: stated.get_whole(key) for name, key in TOKEN_IDS.items()}
    if model_type in OWN:
        raw |= OWN[model_type](stated, raw)
    rope = make_rope(stated, raw, reader.ropes)
    raw |= own_rope(stated, raw, rope) or rope
    try:
        config = check_config(raw, stated.path)
    except FormatError as error:
        what = str(error).removeprefix(f"{stated.path}: ").partition(";")[0]
        raise stated.refuse(f"as {model_type}, its {what}") from error
    _compare(stated, config)
    _check_tensors(stated, config)
    return config


# -- what was made, against the GGUF --------------------------------------------------------------


def _compare(stated: Stated, config: HubConfig) -> None:
    """Refuse a configuration that is not the GGUF's.

    A key that the GGUF lacks is no matter: llama.cpp then takes what the configuration states.
    """
    for key in stated.keys:
        wanted = stated.get(key)
        raw = config.keys.get(key)
        if raw is None:
            is_ignored = key in IGNORED
            if key == "rope.dimension_count":
                is_ignored = wanted == config.rope.n_rot
            if not is_ignored and wanted and wanted != "none":
                raise stated.refuse(f"as {config.model_type}, it has {key} {str(wanted)[:40]}")
            continue
        found = get_value({key: raw}, key)
        if not _is_same(list(found) if isinstance(found, Array) else found, wanted):
            raise stated.refuse(f"as {config.model_type}, it has {key} {str(wanted)[:40]}")


def _is_same(found: object, wanted: object) -> bool:
    if isinstance(found, list) and not isinstance(wanted, list):
        return all(_is_same(item, wanted) for item in found)
    if isinstance(wanted, list) and not isinstance(found, list):
        return all(_is_same(found, item) for item in wanted)
    if isinstance(found, float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted


def _check_tensors(stated: Stated, config: HubConfig) -> None:
    """Refuse a model that lacks a tensor of the family, or has a bias that the family does not use."""
    stems = [*config.family.block, *config.family.experts]
    for parts in (*config.family.halves.values(), *config.family.columns.values()):
        stems += parts
    for layer in range(config.n_layers):
        for stem in stems:
            name = f"blk.{layer}.{stem}"
            if config.lacks(layer, stem) or config.required(stem) == (name in stated.specs):
                continue
            what = "lacks" if config.required(stem) else "has"
            raise stated.refuse(f"as {config.model_type}, it {what} the tensor {name!r}")
    for name in stated.specs:
        if (layer_index(name) or 0) >= config.n_layers:
            raise stated.refuse(f"as {config.model_type}, it has the tensor {name!r}")
