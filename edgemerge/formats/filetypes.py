"""The type of every tensor of an output file, as llama.cpp's llama-quantize picks it.

A file type (`Q4_K_M`) is a mixture: most matrices get its default type, the tensors that suffer
most get more bits, and what is small or fragile is not quantised at all. The rules are those of
llama.cpp's src/llama-quant.cpp at 0c1e57098 (`llama_tensor_get_type_impl`, `tensor_type_fallback`,
`tensor_allows_quantization`), without an importance matrix; function names below refer to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.formats.codec import CODECS, block_size
from edgemerge.formats.metadata import get_value
from edgemerge.types import TensorSpec

__all__ = ["FILE_TYPES", "FileType", "dominant_file_type", "keep_types", "tensor_types"]


@dataclass(frozen=True, slots=True)
class FileType:
    """One row of `FILE_TYPES`."""

    name: str
    id: int  # general.file_type; `llama_ftype` in llama.h
    default: str  # ggml type of a matrix that no rule singles out
    sensitive: str | None = None  # type of attn_v and ffn_down in the layers that get more bits


FILE_TYPES: dict[str, FileType] = {
    row.name: row
    for row in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q6_K", 18, "Q6_K"),
        FileType("Q5_K_M", 17, "Q5_K", sensitive="Q6_K"),
        FileType("Q4_K_M", 15, "Q4_K", sensitive="Q6_K"),
        FileType("Q4_0", 2, "Q4_0"),
    )
}

# `tensor_type_fallback`: what a row gets that 256 does not divide (F16 where 32 does not either).
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Parts of a name that `tensor_allows_quantization` leaves alone. convert_hf_to_gguf always writes
# the first group as F32 and the second in the file's own 16- or 32-bit type.
_KEPT_F32 = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "altup_correct_coef",
    "altup_predict_coef",
    "time_mix_first.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    ".position_embd",
)
_KEPT_AS_IS = (
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_w0.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "attn_rel_b.weight",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
_KEPT_F32_NAMES = ("position_embd.weight", "token_types.weight")
_CONVERTED_F32 = (*_KEPT_F32, "ffn_gate_inp_shexp.weight")  # left alone only for its single row

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_ATTENTION_VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_LAYER = re.compile(r"blk\.(\d+)")

# Layers of the models that llama.cpp calls 70B (`LLM_TYPE_70B` in src/models/*.cpp). Architectures
# of llama's family also need grouped-query attention: 80 layers without it are the 65B model.
_LAYERS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
_GROUPED_70B = ("llama", "llama-embed")

# How the names of weight types begin that edgemerge does not write; all have 4.5 bits or fewer.
_UNWRITTEN = ("IQ", "TQ", "MXFP", "NVFP", "Q3_", "Q2_", "Q1_")

# The file type that llama.cpp names a file after in which a type dominates (`llama_model_loader`).
_FILE_TYPE_IDS = {row.default: row.id for row in FILE_TYPES.values()}
_FILE_TYPE_IDS |= {"Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12}
_FILE_TYPE_IDS |= {"IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25}
_FILE_TYPE_IDS |= {"IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "TQ1_0": 36, "TQ2_0": 37}
_FILE_TYPE_IDS |= {"MXFP4": 38, "NVFP4": 39, "Q1_0": 40}
UNKNOWN_FILE_TYPE = 1024  # LLAMA_FTYPE_GUESSED: llama.cpp looks at the tensors itself


@dataclass(frozen=True, slots=True)
class _Model:
    """What the mixtures want to know of a model beyond one tensor."""

    n_layers: int
    n_experts: int
    n_attention_values: int
    is_70b: bool
    is_falcon: bool
    is_tied: bool


def tensor_types(
    file_type: str,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, bytes],
    architecture: str,
) -> dict[str, str]:
    """Choose the ggml type of every tensor of a file of one type.

    The result is what llama-quantize gives for a model that convert_hf_to_gguf wrote. It quantises
    the matrices whose name ends in "weight", except norms, routers and the like, and copies every
    other tensor as it finds it. Our input may be quantised, or no GGUF at all, so a tensor that
    llama-quantize would copy becomes

    - F32 where convert_hf_to_gguf always writes F32 (vectors, norms, routers, names that do not end
      in ".weight") and where the input is F32;
    - else the file's own type for F32, F16 and BF16 files;
    - else F16 or BF16 as the input has it, and F16 where the input is quantised.

    Parameters
    ----------
    file_type : str
        A key of `FILE_TYPES`.
    specs : mapping of GGUF name to TensorSpec
        All tensors of the model; the types depend on shapes, on names and, as above, on `dtype`.
    metadata : mapping of GGUF key to typed value
        block_count, expert_count, attention.head_count and the like are read from it.
    architecture : str
        GGUF's general.architecture.

    Returns
    -------
    dict
        GGUF tensor name -> ggml type name, in the order of `specs`.

    Raises
    ------
    RecipeError
        No such file type.
    MismatchError
        The metadata lack block_count, or a tensor's layer lies beyond it, where the mixture asks.
    """
    if file_type not in FILE_TYPES:
        known = ", ".join(FILE_TYPES)
        raise RecipeError(f"unknown file type {file_type!r}; choose one of {known}", field="type")
    rule = FILE_TYPES[file_type]
    if block_size(rule.default)[0] == 1:
        return {
            name: rule.default if _is_quantised(spec) else _type_left_alone(spec, rule)
            for name, spec in specs.items()
        }
    model = _describe(specs, metadata, architecture, rule)
    types: dict[str, str] = {}
    i_value = i_down = 0  # positions among the attention values and the ffn_downs visited so far
    for name in sorted(specs, key=_visiting_order):
        spec = specs[name]
        if not _is_quantised(spec):
            types[name] = _type_left_alone(spec, rule)
            continue
        if name == "output.weight" or (model.is_tied and name in _EMBEDDINGS):
            chosen = _output_type(spec, rule, model)
        elif name in _EMBEDDINGS:
            chosen = rule.default
        elif any(part in name for part in _ATTENTION_VALUES):
            chosen = _attention_value_type(rule, model, i_value)
            i_value += 1
        elif "attn_k.weight" in name or "attn_output.weight" in name:
            chosen = _attention_type(name, rule, model)
        elif "ffn_down" in name and not ("ffn_up" in name or "ffn_gate" in name):
            chosen = _ffn_down_type(name, rule, model, i_down)
            i_down += 1
        else:
            chosen = rule.default
        types[name] = _divisible(chosen, spec.n_cols)
    return {name: types[name] for name in specs}


def keep_types(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, str], list[str]]:
    """Give every tensor the type that it has in the base model, or the nearest that can be written.

    The types that edgemerge does not write (IQ, TQ, MXFP4, NVFP4, Q3_K and smaller) have at most
    4.5 bits per weight. Each becomes Q4_K (4.5) where 256 divides the row, and else Q5_0 (5.5), to
    which llama-quantize falls back for such rows too: Q4_0 has as many bits as IQ4_NL, but its
    evenly spaced levels fit weights worse.

    Parameters
    ----------
    specs : mapping of GGUF name to TensorSpec
        All tensors of the base model.

    Returns
    -------
    types : dict
        GGUF tensor name -> ggml type name, in the order of `specs`.
    notes : list of str
        One sentence for every kind of substitution.

    Raises
    ------
    MismatchError
        A type that is not for weights (integers, F64).
    """
    types: dict[str, str] = {}
    replaced: Counter[tuple[str, str]] = Counter()
    for name, spec in specs.items():
        if spec.dtype in CODECS and CODECS[spec.dtype].can_encode:
            types[name] = spec.dtype
            continue
        if not spec.dtype.startswith(_UNWRITTEN):
            raise MismatchError(
                f"tensor {name!r} of the base has type {spec.dtype}, which edgemerge cannot write;"
                " name an output type instead of keeping the base's",
                tensor=name,
            )
        types[name] = "Q4_K" if spec.n_cols % 256 == 0 else "Q5_0"
        replaced[spec.dtype, types[name]] += 1
    notes = [
        f"{count} {old} tensor{'s' * (count > 1)} written as {new}: edgemerge does not write {old}"
        for (old, new), count in replaced.items()
    ]
    return types, notes


def dominant_file_type(types: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> int:
    """Guess general.file_type: the id of the file type whose default type most elements have.

    For the types of `keep_types` where the base does not say. llama.cpp itself counts tensors, and
    so the norms of a model can win over its weights.
    """
    elements: Counter[str] = Counter()
    for name, ggml_type in types.items():
        elements[ggml_type] += specs[name].n_elements
    ((ggml_type, _),) = elements.most_common(1) or [("F32", 0)]
    return _FILE_TYPE_IDS.get(ggml_type, UNKNOWN_FILE_TYPE)


def _is_quantised(spec: TensorSpec) -> bool:
    """`tensor_allows_quantization`: ggml counts dimensions up to the last that is not 1."""
    return (
        spec.n_rows > 1
        and spec.name.endswith("weight")
        and spec.name not in _KEPT_F32_NAMES
        and not any(part in spec.name for part in _KEPT_F32)
        and not any(part in spec.name for part in _KEPT_AS_IS)
    )


def _type_left_alone(spec: TensorSpec, rule: FileType) -> str:
    """Type of a tensor that llama-quantize copies; the rule is in `tensor_types`."""
    always_f32 = (
        len(spec.shape) < 2
        or not spec.name.endswith(".weight")
        or spec.name in _KEPT_F32_NAMES
        or any(part in spec.name for part in _CONVERTED_F32)
    )
    if always_f32 or spec.dtype == "F32":
        return "F32"
    if block_size(rule.default)[0] == 1:
        return rule.default
    return "BF16" if spec.dtype == "BF16" else "F16"


def _describe(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, bytes],
    architecture: str,
    rule: FileType,
) -> _Model:
    """Read off the metadata and the names what the mixture depends on."""
    n_layers = _integer(metadata, f"{architecture}.block_count")
    if n_layers is None and rule.sensitive is not None:
        raise MismatchError(
            f"the model's metadata have no {architecture}.block_count, which {rule.name} depends on"
        )
    n_heads = _integer(metadata, f"{architecture}.attention.head_count")
    n_kv_heads = _integer(metadata, f"{architecture}.attention.head_count_kv")
    n_next = _integer(metadata, f"{architecture}.nextn_predict_layers") or 0
    is_grouped = n_kv_heads is not None and n_kv_heads != n_heads
    return _Model(
        n_layers=n_layers or 0,
        n_experts=_integer(metadata, f"{architecture}.expert_count") or 0,
        n_attention_values=sum(any(p in name for p in _ATTENTION_VALUES) for name in specs),
        is_70b=(n_layers or 0) - n_next == _LAYERS_OF_70B.get(architecture)
        and (is_grouped or architecture not in _GROUPED_70B),
        is_falcon=architecture == "falcon",
        is_tied="output.weight" not in specs,
    )


def _integer(metadata: Mapping[str, bytes], key: str) -> int | None:
    """Return a number, or its value in the first layer where the model has one per layer."""
    value = get_value(metadata, key)
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _visiting_order(name: str) -> tuple[int, str]:
    """Order in which llama.cpp walks the tensors, whatever their order in the file."""
    return (-1 if (layer := _layer(name)) is None else layer), name


def _layer(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _gets_more_bits(i: int, n: int) -> bool:
    """`use_more_bits`: the first and the last eighth, and every third layer between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _output_type(spec: TensorSpec, rule: FileType, model: _Model) -> str:
    if rule.default == "Q8_0" or model.is_falcon or spec.n_cols % block_size(rule.default)[0]:
        return "Q8_0"
    return "Q6_K"


def _attention_value_type(rule: FileType, model: _Model, i: int) -> str:
    if model.n_experts == 8:  # small beside eight experts
        return "Q8_0"
    if rule.sensitive is not None and _gets_more_bits(i, model.n_attention_values):
        return rule.sensitive
    # Eight query heads share each of a 70B model's value heads, so that the tensor is small.
    return "Q5_K" if model.is_70b and rule.default == "Q4_K" else rule.default


def _attention_type(name: str, rule: FileType, model: _Model) -> str:
    if model.n_experts != 8:
        return rule.default
    if "attn_k.weight" in name:
        return "Q8_0"
    return "Q5_K" if rule.name == "Q4_K_M" and not model.is_falcon else rule.default


def _ffn_down_type(name: str, rule: FileType, model: _Model, i: int) -> str:
    if rule.sensitive is None:
        return rule.default
    n = model.n_layers
    if model.n_experts > 1:  # several ffn_downs in a layer: the position says nothing
        layer = _layer(name)
        if layer is None or layer >= n:
            raise MismatchError(
                f"tensor {name!r} is in none of the {n} layers that the model's metadata state",
                tensor=name,
            )
        i = layer
    if model.is_falcon and rule.name == "Q4_K_M":
        return "Q6_K" if i < n // 16 else "Q5_K" if _gets_more_bits(i, n) else "Q4_K"
    return rule.sensitive if _gets_more_bits(i, n) else rule.default


def _divisible(ggml_type: str, n_cols: int) -> str:
    """`tensor_type_fallback`: the type itself where its block divides the row."""
    if n_cols % block_size(ggml_type)[0] == 0:
        return ggml_type
    smaller = _FALLBACK.get(ggml_type, ggml_type)
    return smaller if n_cols % block_size(smaller)[0] == 0 else "F16"
