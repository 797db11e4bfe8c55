"""config.json of a model that is a GGUF: made of its metadata, then read back and compared with that.

GGUF states less than config.json, and several model types are one architecture to it. So each of them is
tried. A configuration counts if `edgemerge.formats.hub.config` makes the same metadata of it. Whatever the
tables here do not know is refused by its key's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.formats.architectures import FAMILIES, layer_index
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.hub.config import MAX_HEAD_DIM, MAX_LAYERS, HubConfig, check_config
from edgemerge.formats.hub.families import READERS
from edgemerge.formats.hub.granite import GRANITE_SCALES
from edgemerge.formats.hub.own_keys import SIZE_OF_27B
from edgemerge.formats.hub.reader import Reader
from edgemerge.formats.hub.rope import LLAMA3_DEFAULTS, llama3_factors, yarn_scale
from edgemerge.types import Float32, TensorSpec

__all__ = ["make_config"]

REMEDY = "give the directory that it was made from, or write a GGUF"
# GGUF's key without the architecture's name -> config.json's
SSM_KEYS = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.inner_size": "mamba_expand",  # times the width of the model
    "ssm.time_step_rank": "mamba_n_heads",
}
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
    "expert_feed_forward_length": "moe_intermediate_size",
    "shortconv.l_cache": "conv_L_cache",
    **GRANITE_SCALES,
    **SSM_KEYS,
}
TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# What some converters write and the arithmetic does not need, or what is compared otherwise.
IGNORED = ("vocab_size", "rope.dimension_count", "tensor_data_layout", "rope.scaling.finetuned")
FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_THETA = 10000.0
MAX_ORIGINAL = 1 << 24

_MISSHAPEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Json = dict[str, Any]
ReadF32 = Callable[[str], Float32]


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
    read_f32 : callable
        GGUF name -> values of a small tensor in float32.

    Raises
    ------
    FormatError
        No directory of the model types that edgemerge reads holds this model.
    """
    stated = _Stated(path, metadata, specs, read_f32)
    types = [name for name, family in FAMILIES.items() if family.architecture == stated.name]
    has_experts = bool(stated.get("expert_count"))
    types = [name for name in types if has_experts == bool(FAMILIES[name].experts)]
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


class _Stated:
    """What a GGUF says of its architecture."""

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, bytes],
        specs: Mapping[str, TensorSpec],
        read_f32: ReadF32,
    ) -> None:
        self.path, self.specs, self.read_f32 = path, specs, read_f32
        self.name = str(get_value(metadata, "general.architecture"))
        prefix = f"{self.name}."
        self.keys = [key.removeprefix(prefix) for key in metadata if key.startswith(prefix)]
        self._metadata = metadata

    def get(self, key: str) -> Any:
        """Return a value of the architecture; a list of an array, and a float32 as one writes it."""
        return self.get_whole(f"{self.name}.{key}")

    def get_whole(self, key: str) -> Any:
        """Return a value by its whole key."""
        value = get_value(self._metadata, key)
        if isinstance(value, Array):
            return list(value)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def refuse(self, what: str) -> FormatError:
        return FormatError(f"{what}, so no directory can be made of it; {REMEDY}", path=self.path)


def _make(stated: _Stated, model_type: str) -> HubConfig:
    reader = READERS[model_type]
    raw: Json = {"architectures": [reader.classes[0]], "model_type": model_type}
    for key, name in PLAIN.items():
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
    raw |= _own_values(stated, raw, model_type)
    raw |= _rope(stated, raw, reader)
    try:
        config = check_config(raw, stated.path)
    except FormatError as error:
        what = str(error).removeprefix(f"{stated.path}: ").partition(";")[0]
        raise stated.refuse(f"as {model_type}, its {what}") from error
    _compare(stated, config)
    _check_tensors(stated, config)
    return config


def _own_values(stated: _Stated, raw: Json, model_type: str) -> Json:
    """Return what one model type alone states, or states otherwise."""
    n_layers = raw.get("num_hidden_layers") or 0
    match model_type:
        case "llama":
            return {
                "attention_bias": "blk.0.attn_q.bias" in stated.specs,
                "mlp_bias": "blk.0.ffn_up.bias" in stated.specs,
            }
        case "gemma2" | "gemma3_text":
            is_27b = n_layers == SIZE_OF_27B[model_type]
            scalar = raw["hidden_size"] // raw["num_attention_heads"] if is_27b else None
            own: Json = {"query_pre_attn_scalar": scalar or raw.get("head_dim")}
            if (theta := stated.get("rope.freq_base_swa")) is not None:
                own["rope_local_base_freq"] = theta
            if model_type == "gemma3_text" and stated.get("attention.sliding_window") is None:
                own["layer_types"] = ["full_attention"] * n_layers
            return own
        case "qwen3_moe":
            return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        case "phi3":
            rotated, length = stated.get("rope.dimension_count"), _head_length(raw)
            return {
                "sliding_window": raw.get("sliding_window") or None,
                "original_max_position_embeddings": stated.get(
                    "rope.scaling.original_context_length"
                ),
                "partial_rotary_factor": rotated / length if rotated and length else None,
            }
        case "granitemoehybrid":
            width = raw.get("mamba_expand") or 0
            return {
                "layer_types": ["attention"] * n_layers,
                "num_local_experts": 0,
                "position_embedding_type": "rope",
                "shared_intermediate_size": raw.get("intermediate_size"),
                "mamba_expand": width // max(1, raw["hidden_size"]),
            }
        case "lfm2":
            heads = stated.get("attention.head_count_kv")
            heads = heads if isinstance(heads, list) else [heads] * n_layers
            return {
                "layer_types": ["full_attention" if count else "conv" for count in heads],
                "block_auto_adjust_ff_dim": False,
            }
        case "olmo3":
            slides = stated.get("attention.sliding_window_pattern") or []
            return {"layer_types": ["sliding_attention" if s else "full_attention" for s in slides]}
    return {}


def _head_length(raw: Json) -> int:
    return int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])


# -- the rotation ---------------------------------------------------------------------------------


def _rope(stated: _Stated, raw: Json, reader: Reader) -> Json:
    theta = stated.get("rope.freq_base")
    found: Json = {"rope_theta": ROPE_THETA if theta is None else theta}
    values: Json = {}
    kind = stated.get("rope.scaling.type")
    if kind in ("linear", "yarn"):
        values = {"rope_type": kind, "factor": stated.get("rope.scaling.factor")}
    if kind == "yarn":
        names = {
            "original_max_position_embeddings": "original_context_length",
            "extrapolation_factor": "yarn_ext_factor",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
            "mscale_all_dim": "yarn_log_multiplier",
        }
        values |= {name: stated.get(f"rope.scaling.{key}") for name, key in names.items()}
        if values["mscale_all_dim"] is not None:
            values["mscale"] = 1.0  # what llama.cpp takes it to be
        if values["attention_factor"] is None:
            values["attention_factor"] = _attention_factor(stated, values)
        values["llama_4_scaling_beta"] = stated.get("attention.temperature_scale")
    if LONG in stated.specs and SHORT in stated.specs:
        values = {
            "rope_type": "longrope",
            "long_factor": [float(str(value)) for value in _factors(stated, LONG)],
            "short_factor": [float(str(value)) for value in _factors(stated, SHORT)],
            "attention_factor": stated.get("rope.scaling.attn_factor"),
        }
    if FREQUENCIES in stated.specs:
        values = _llama3(stated, found["rope_theta"], _head_length(raw))
    values = {name: value for name, value in values.items() if value is not None}
    return found | ({"rope_scaling": values} if values else {})


def _attention_factor(stated: _Stated, values: Json) -> float | None:
    """Return what the attention's temperature is divided by, where it is not llama.cpp's own factor."""
    ratio, factor = stated.get("rope.scaling.attn_factor"), values["factor"]
    if ratio is None or factor is None:
        return None
    multiplier = values["mscale_all_dim"]
    return float(ratio * yarn_scale(factor, 1.0) / yarn_scale(factor, multiplier or 0.0))


def _factors(stated: _Stated, name: str) -> Float32:
    """Read divisors of frequencies, one for each pair of elements of a head."""
    if 2 * stated.specs[name].n_elements > MAX_HEAD_DIM:
        raise stated.refuse(f"its {name} has {stated.specs[name].n_elements} elements")
    factors = stated.read_f32(name)
    if not np.all(np.isfinite(factors)):
        raise stated.refuse(f"its {name} holds NaN or infinity")
    return factors


def _llama3(stated: _Stated, theta: float, head_dim: int) -> Json:
    """Find the parameters whose divisors of frequencies the model has.

    Raises
    ------
    FormatError
        None of those that models are published with gives them.
    """
    factors = _factors(stated, FREQUENCIES)
    if not (1 < theta <= 1e38 and 2 * factors.size == head_dim and np.all(factors >= 1)):
        raise stated.refuse(f"its {FREQUENCIES} does not fit to its other keys")
    values = {**LLAMA3_DEFAULTS, "factor": float(str(factors.max()))}
    original = 1
    while original <= MAX_ORIGINAL:
        found = llama3_factors(theta, head_dim, original, *values.values())
        # Others compute them in float32 throughout, which may differ in the last places.
        if found.shape == factors.shape and np.allclose(found, factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                **values,
                "original_max_position_embeddings": original,
            }
        original *= 2
    raise stated.refuse(f"its {FREQUENCIES} is not what rope type llama3 makes")


# -- what was made, against the GGUF --------------------------------------------------------------


def _compare(stated: _Stated, config: HubConfig) -> None:
    """Refuse a configuration that is not the GGUF's.

    A key that the GGUF lacks is no matter: llama.cpp then takes what the configuration states.
    """
    for key in stated.keys:
        wanted = stated.get(key)
        if key == "rope.dimension_count" and wanted != config.rope.n_rot:
            raise stated.refuse(f"as {config.model_type}, it has {key} {wanted}")
        raw = config.keys.get(key)
        if raw is None:
            if key not in IGNORED and wanted and wanted != "none":
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


def _check_tensors(stated: _Stated, config: HubConfig) -> None:
    """Refuse a model that lacks a tensor of the family, or has a bias that the family does not use."""
    stems = [*config.family.block, *config.family.experts]
    stems += [stem for halves in config.family.halves.values() for stem in halves]
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
