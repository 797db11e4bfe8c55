"""The type of every tensor of an output file, as llama.cpp's llama-quantize picks it.

A file type (`Q4_K_M`) is a mixture: most matrices get its default type, the tensors that suffer
most get more bits (`mixtures`), and what is small or fragile is not quantised at all. The rules are
those of llama.cpp's src/llama-quant.cpp at 0c1e57098 (`llama_tensor_get_type`,
`tensor_type_fallback`, `tensor_allows_quantization`); function names below refer to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.formats.quants.codec import CODECS, block_size, find_codec
from edgemerge.formats.quants.mixtures import Mixture, visiting_order
from edgemerge.formats.quants.overrides import TypeOverrides
from edgemerge.suggestions import suggest
from edgemerge.types import TensorSpec

__all__ = ["FILE_TYPES", "FileType", "dominant_file_type", "keep_types", "stays_f32"]
__all__ += ["tensor_types", "unknown_type"]


@dataclass(frozen=True, slots=True)
class FileType:
    """One row of `FILE_TYPES`."""

    name: str
    id: int  # general.file_type; `llama_ftype` in llama.h
    default: str  # ggml type of a matrix that no rule singles out


FILE_TYPES: dict[str, FileType] = {
    row.name: row
    for row in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q6_K", 18, "Q6_K"),
        FileType("Q5_K_M", 17, "Q5_K"),
        FileType("Q5_K_S", 16, "Q5_K"),
        FileType("Q5_1", 9, "Q5_1"),
        FileType("Q5_0", 8, "Q5_0"),
        FileType("Q4_K_M", 15, "Q4_K"),
        FileType("Q4_K_S", 14, "Q4_K"),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q4_0", 2, "Q4_0"),
        FileType("IQ4_NL", 25, "IQ4_NL"),
        FileType("IQ4_XS", 30, "IQ4_XS"),
        FileType("Q3_K_L", 13, "Q3_K"),
        FileType("Q3_K_M", 12, "Q3_K"),
        FileType("Q3_K_S", 11, "Q3_K"),
        FileType("Q2_K", 10, "Q2_K"),
    )
}

# `tensor_type_fallback`: what a row gets that 256 does not divide (F16 where 32 does not either).
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_FALLBACK |= dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0")

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


# What `keep` writes for the lattice types, which edgemerge reads only: no fewer bits.
_UNWRITTEN = {"IQ3_S": "Q3_K", "IQ3_XXS": "Q3_K"}
_UNWRITTEN |= dict.fromkeys(("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), "Q2_K")

# The file type that llama.cpp names a file after in which a type dominates (`llama_model_loader`).
_FILE_TYPE_IDS = {row.default: row.id for row in FILE_TYPES.values()}
_FILE_TYPE_IDS |= {"Q5_K": 17, "Q4_K": 15, "Q3_K": 12}  # of several, the one it names
_FILE_TYPE_IDS |= {"IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ3_S": 26}
_FILE_TYPE_IDS |= {"IQ2_S": 28, "IQ1_M": 31, "TQ1_0": 36, "TQ2_0": 37}
_FILE_TYPE_IDS |= {"MXFP4": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41}
UNKNOWN_FILE_TYPE = 1024  # LLAMA_FTYPE_GUESSED: llama.cpp looks at the tensors itself


def unknown_type(asked: str, known: Collection[str]) -> RecipeError:
    """Say that nothing can be written as a type, and what was perhaps meant."""
    codec, medium = CODECS.get(asked.upper()), f"{asked.upper()}_M"
    if codec is not None and not codec.can_encode:
        sentence = f"{codec.dtype} can be read, not written; known are {', '.join(known)}"
    elif medium in known:
        sentence = f"unknown type {asked!r}; did you mean {medium!r}?"
    else:
        sentence = f"unknown type {asked!r}; {suggest(asked, known, cutoff=0.8)}"
    return RecipeError(sentence, field="type")


def tensor_types(
    file_type: str,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, bytes],
    architecture: str,
    *,
    overrides: TypeOverrides | None = None,
    has_importance: bool = False,
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
    overrides : TypeOverrides, optional
        Types for single tensors, of those that are quantised.
    has_importance : bool
        Whether an importance matrix guides the encoders, which some mixtures ask.

    Returns
    -------
    dict
        GGUF tensor name -> ggml type name, in the order of `specs`.

    Raises
    ------
    RecipeError
        No such file type, or it is not quantised and there are overrides.
    MismatchError
        The metadata lack block_count, or a tensor's layer is not below it, where the mixture asks; or
        a row is no whole number of blocks of its override's type, which llama.cpp replaces by none.
    """
    overrides = overrides or TypeOverrides()
    if file_type not in FILE_TYPES:
        raise unknown_type(file_type, FILE_TYPES)
    rule = FILE_TYPES[file_type]
    if block_size(rule.default)[0] == 1:
        overrides.refuse_for(rule.name)
        return {
            name: rule.default if _is_quantised(spec) else _type_left_alone(spec, rule)
            for name, spec in specs.items()
        }
    mixture = Mixture(
        rule.name, rule.default, specs, metadata, architecture, has_importance=has_importance
    )
    types: dict[str, str] = {}
    for name in sorted(specs, key=visiting_order):
        spec = specs[name]
        if not _is_quantised(spec):
            types[name] = _type_left_alone(spec, rule)
        else:
            # The mixture counts only the tensors that it is asked about, as llama.cpp does.
            types[name] = _divisible(overrides.choose(name) or mixture.choose(spec), spec)
    return {name: types[name] for name in specs}


def keep_types(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, str], list[str]]:
    """Give every tensor the type that it has in the base model, or the nearest that can be written.

    The types that edgemerge does not write (IQ1, IQ2, IQ3) become the smallest that it writes of at
    least as many bits, Q2_K or Q3_K, whose blocks have the same 256 weights. What convert_hf_to_gguf
    always writes as F32 is F32: with norms in F16, as a directory has them, llama.cpp aborts.

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
        codec = find_codec(spec)
        if stays_f32(spec):
            types[name] = "F32"
            continue
        if codec.can_encode:
            types[name] = spec.dtype
            continue
        types[name] = _UNWRITTEN[spec.dtype]
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


def stays_f32(spec: TensorSpec) -> bool:
    """Whether convert_hf_to_gguf writes a tensor as F32, whatever the file type."""
    return (
        len(spec.shape) < 2
        or not spec.name.endswith(".weight")
        or spec.name in _KEPT_F32_NAMES
        or any(part in spec.name for part in _CONVERTED_F32)
    )


def _type_left_alone(spec: TensorSpec, rule: FileType) -> str:
    """Type of a tensor that llama-quantize copies; the rule is in `tensor_types`."""
    if stays_f32(spec) or spec.dtype == "F32":
        return "F32"
    if block_size(rule.default)[0] == 1:
        return rule.default
    return "BF16" if spec.dtype == "BF16" else "F16"


def _divisible(ggml_type: str, spec: TensorSpec) -> str:
    """`tensor_type_fallback`: the type itself where its block divides the row."""
    block_len, _ = block_size(ggml_type)
    if spec.n_cols % block_len == 0:
        return ggml_type
    if block_len > 32 and ggml_type not in _FALLBACK:
        raise MismatchError(
            f"tensor {spec.name!r} has rows of {spec.n_cols}, which {ggml_type} blocks of "
            f"{block_len} do not fill; give it another type",
            tensor=spec.name,
        )
    smaller = _FALLBACK.get(ggml_type, ggml_type)
    return smaller if spec.n_cols % block_size(smaller)[0] == 0 else "F16"
