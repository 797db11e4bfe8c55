"""Checks before any work that models fit together. An error names the tensor and both shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from edgemerge.errors import FormatError, MismatchError
from edgemerge.finding.cache import folder_name
from edgemerge.formats.constants import is_constant
from edgemerge.formats.gguf.kind import check_is_model
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.planning.vocabulary import BY_TEXT, EMBEDDING, OUTPUT, note_vocabularies
from edgemerge.types import Source, TensorSpec

__all__ = [
    "check_models",
    "check_scaled_output",
    "find_head",
    "find_tensor",
    "has_elements",
    "is_scale",
    "layer_settings",
    "missing_tensor",
    "read_tensor",
    "same_constant",
    "same_scale",
    "same_shape",
    "same_width",
]

ORIGINAL_LENGTH = "{}.rope.scaling.original_context_length"
SCALING_TYPE = "{}.rope.scaling.type"
# Hyper-parameters that decide what a weight means; {} stands for the architecture.
DECISIVE_KEYS = (
    "{}.attention.head_count",
    "{}.attention.head_count_kv",
    "{}.attention.key_length",
    "{}.attention.value_length",
    "{}.rope.dimension_count",
    "{}.expert_count",
    "{}.expert_used_count",
)
# Differences that do not prevent a merge, but that its user should know.
TELLING_KEYS = (
    "{}.rope.freq_base",
    SCALING_TYPE,
    "{}.rope.scaling.factor",
    ORIGINAL_LENGTH,
    "{}.rope.scaling.attn_factor",
    "{}.rope.scaling.yarn_ext_factor",
    "{}.rope.scaling.yarn_attn_factor",
    "{}.rope.scaling.yarn_beta_fast",
    "{}.rope.scaling.yarn_beta_slow",
    "{}.rope.scaling.yarn_log_multiplier",
    "{}.rope.freq_base_swa",
    "{}.context_length",
    "{}.attention.layer_norm_epsilon",
    "{}.attention.layer_norm_rms_epsilon",
    "{}.attention.sliding_window",
    "{}.attention.sliding_window_pattern",
)
# Values that llama.cpp's `load_hparams` computes with where a model lacks the key.
UNSTATED: Mapping[str, tuple[float | str, ...]] = {
    "{}.rope.freq_base": (10000.0,),
    SCALING_TYPE: ("none", "linear"),  # linear by a factor that is 1
    "{}.rope.scaling.factor": (0.0, 1.0),
    "{}.rope.scaling.attn_factor": (1.0,),
    "{}.rope.scaling.yarn_ext_factor": (-1.0,),
    "{}.rope.scaling.yarn_attn_factor": (1.0,),
    "{}.rope.scaling.yarn_beta_fast": (32.0,),
    "{}.rope.scaling.yarn_beta_slow": (1.0,),
    "{}.rope.scaling.yarn_log_multiplier": (0.0,),
    "{}.attention.sliding_window": (0,),
    "gemma2.attention.sliding_window": (4096,),
    "gemma3.rope.freq_base_swa": (10000.0,),
    "gemma3n.rope.freq_base_swa": (10000.0,),
}
# Keys that it takes there instead.
STAND_INS = {
    ORIGINAL_LENGTH: "{}.context_length",
    "{}.rope.freq_base_swa": "{}.rope.freq_base",
}
LAYOUT_KEY = "{}.tensor_data_layout"
KNOWN_LAYOUTS = (None, "Meta AI original pth")
LEARNT_SCALES = ("ffn_gate_inp.scale", "ffn_down_exps.scale")  # in Gemma 4
UNSCALED = "get these models as F16, BF16 or F32, whose weights have no factors"


def is_scale(name: str, source: Source) -> bool:
    """Tell whether a tensor is the factor of another one, as NVFP4 weights have it.

    llama.cpp multiplies the product with `NAME.weight` by `NAME.scale` (`build_lora_mm`), one number
    or one per expert. So it is as much part of the weights as a block's own scale, and no weight.
    """
    if name.endswith(LEARNT_SCALES) and source.architecture == "gemma4":
        weight = source.specs().get(f"{name.rpartition('.')[0]}.weight")
        return weight is not None and weight.dtype == "NVFP4"
    return name.endswith((".scale", ".input_scale"))


def layer_settings(metadata: Mapping[str, bytes], n_layers: object) -> dict[str, Array]:
    """Return the hyper-parameters that are arrays with an entry per layer."""
    others = ("tokenizer.", "general.", "edgemerge.")
    own = (key for key in metadata if not key.startswith(others))
    return {
        key: value
        for key in own
        if isinstance(value := get_value(metadata, key), Array) and len(value) == n_layers
    }


def check_models(
    sources: Sequence[Source],
    vocabulary: Source | None = None,
    *,
    by_text: bool = False,
    remedy: str = BY_TEXT,
) -> list[str]:
    """Compare all models with the first.

    Parameters
    ----------
    sources : sequence of Source
        Open models.
    vocabulary : Source, optional
        The one of them whose tokens the output gets; by default the first.
    by_text : bool
        Whether rows are found by the texts of their tokens, so that vocabularies may differ.
    remedy : str
        What to do where vocabularies have little in common.

    Returns
    -------
    list of str
        One sentence for each difference that does not prevent the merge.

    Raises
    ------
    MismatchError
        Architectures, head counts or vocabularies differ.
    FormatError
        A GGUF states a tensor layout that nobody knows, or is no model.
    """
    first, *others = sources
    arch = first.architecture
    for source in sources:
        check_is_model(source.path, source.metadata())
        layout = get_value(source.metadata(), LAYOUT_KEY.format(source.architecture))
        if layout not in KNOWN_LAYOUTS:
            raise FormatError(
                f"its tensor_data_layout {layout!r} is unknown; convert the model anew",
                path=source.path,
            )
    notes = [note for source in sources for note in source.notes()]
    for other in others:
        if other.architecture != arch:
            raise MismatchError(
                f"{first.path} is a {arch} model and {other.path} is a {other.architecture} model; "
                "only fine-tunes of one architecture can be merged"
            )
        _check_hyper_parameters(first, other, notes)
        notes += _note_constants(first, other)
    owner = vocabulary or first
    for source in sources:
        if source is not owner and not by_text:
            notes += note_vocabularies(owner, source, remedy)
    return notes


def _check_hyper_parameters(first: Source, other: Source, notes: list[str]) -> None:
    for pattern in DECISIVE_KEYS + TELLING_KEYS:
        key = pattern.format(first.architecture)
        if first.metadata().get(key) == other.metadata().get(key):
            continue
        left, right = get_value(first.metadata(), key), get_value(other.metadata(), key)
        if left == right:  # the same number in another integer type
            continue
        is_stated_once = left is None or right is None
        if pattern in DECISIVE_KEYS:
            if is_stated_once:
                continue
            raise MismatchError(
                f"{key} is {left} in {first.path} and {right} in {other.path}; "
                "only fine-tunes of one base can be merged"
            )
        names = folder_name(first.path), folder_name(other.path)
        if is_stated_once and _goes_without_saying(pattern, first, other):
            continue
        if isinstance(left, Array) and isinstance(right, Array):
            notes.append(f"{key} is not the same in {names[0]} and {names[1]}")
            continue
        left, right = ("absent" if value is None else value for value in (left, right))
        notes.append(f"{key} is {left} in {names[0]} and {right} in {names[1]}")


def _goes_without_saying(pattern: str, first: Source, other: Source) -> bool:
    """Tell whether a key that one of two models states says what llama.cpp takes without it."""
    arch = first.architecture
    key, models = pattern.format(arch), (first, other)
    if pattern == ORIGINAL_LENGTH and not any(
        SCALING_TYPE.format(arch) in model.metadata() for model in models
    ):
        return True  # nothing is scaled that it could be the measure of
    lacking, stating = sorted(models, key=lambda model: key in model.metadata())
    stated, unstated = get_value(stating.metadata(), key), UNSTATED.get(key, UNSTATED.get(pattern))
    if unstated is None and pattern in STAND_INS:
        return stated == get_value(lacking.metadata(), STAND_INS[pattern].format(arch))
    return stated in (unstated or ())


def _note_constants(first: Source, other: Source) -> Iterator[str]:
    """Say which constants are not the same; some models have the scaling of their rope nowhere else."""
    left, right = folder_name(first.path), folder_name(other.path)
    end = (
        "as a constant it is neither merged nor part of a delta or an adapter, and stays as it is in the "
        "base, or in the first model where there is no base"
    )
    for name in dict.fromkeys(filter(is_constant, (*first.specs(), *other.specs()))):
        owners = [source for source in (first, other) if name in source.specs()]
        if len(owners) == 1:
            lacking = right if owners[0] is first else left
            yield f"{folder_name(owners[0].path)} has {name} and {lacking} has not; {end}"
        elif not same_constant(name, first, other):
            yield f"{name} is not the same in {left} and {right}; {end}"


def same_constant(name: str, left: Source, right: Source) -> bool:
    """Tell whether a constant of two models is the same but for the last place; reads it, a few bytes."""
    first, second = left.specs()[name], right.specs()[name]
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    stored = read_tensor(left, name), read_tensor(right, name)
    if stored[0] == stored[1] or first.dtype != "F32":
        return stored[0] == stored[1]
    ours, theirs = (np.frombuffer(raw, np.float32) for raw in stored)
    return np.allclose(ours, theirs, rtol=1e-5, atol=0)


def same_shape(
    left: TensorSpec, right: TensorSpec, left_model: Source, right_model: Source
) -> None:
    """Refuse two tensors that are to be merged and are not alike.

    Raises
    ------
    MismatchError
        Their shapes differ.
    """
    if left.shape != right.shape:
        raise MismatchError(
            f"tensor {left.name!r} is {_show(left.shape)} in {left_model.path} and "
            f"{_show(right.shape)} in {right_model.path}; only fine-tunes of one base can be "
            "merged",
            tensor=left.name,
            shapes=(left.shape, right.shape),
        )


def has_elements(spec: TensorSpec, model: Source) -> None:
    """Refuse a tensor that holds nothing.

    Raises
    ------
    MismatchError
        One of its dimensions is 0.
    """
    if 0 in spec.shape:
        raise MismatchError(
            f"tensor {spec.name!r} of {model.path} has the shape {_show(spec.shape)}, which holds nothing; "
            "get that model again",
            tensor=spec.name,
        )


def same_width(
    left: TensorSpec, right: TensorSpec, left_model: Source, right_model: Source
) -> None:
    """Refuse two tensors whose rows are of different lengths.

    Raises
    ------
    MismatchError
        As `same_shape`.
    """
    if left.shape[1:] != right.shape[1:]:
        same_shape(left, right, left_model, right_model)


def find_tensor(source: Source, name: str) -> TensorSpec:
    """Look a tensor up in one model.

    Raises
    ------
    MismatchError
        The model lacks it.
    """
    specs = source.specs()
    if name not in specs:
        raise missing_tensor(name, source)
    return specs[name]


def find_head(source: Source, name: str) -> TensorSpec:
    """Look a tensor up; the head of a tied model is its embedding.

    Raises
    ------
    MismatchError
        The model lacks it.
    """
    if name == OUTPUT and name not in source.specs():
        return find_tensor(source, EMBEDDING)
    return find_tensor(source, name)


def missing_tensor(name: str, source: Source, owner: Source | None = None) -> MismatchError:
    """Say that a model lacks a tensor, which `owner` has."""
    whose = f" of {owner.path}" if owner else ""
    remedy = (
        UNSCALED if is_scale(name, owner or source) else "only fine-tunes of one base can be merged"
    )
    return MismatchError(
        f"tensor {name!r}{whose} is missing in {source.path}; {remedy}", tensor=name
    )


def same_scale(name: str, left: Source, other: str, right: Source) -> None:
    """Refuse two factors that are not equal; reads them, a few bytes.

    Raises
    ------
    MismatchError
        They differ: a sum of weights that stand under different factors has no factor.
    """
    if read_tensor(left, name) != read_tensor(right, other):
        raise MismatchError(
            f"tensor {name!r}, by which llama.cpp multiplies its weights, is not the same in "
            f"{left.path} and {right.path}; {UNSCALED}",
            tensor=name,
        )


def read_tensor(source: Source, name: str) -> bytes:
    """Read all of a small tensor, as stored."""
    spec = source.specs()[name]
    raw = np.empty(spec.nbytes, np.uint8)
    source.read_rows(name, 0, spec.n_rows, raw)
    return raw.tobytes()


def check_scaled_output(types: Mapping[str, str], model: Source) -> None:
    """Refuse to take the type from an output matrix that has a factor.

    Parameters
    ----------
    types : mapping of GGUF name to ggml type name
        All tensors of the output.
    model : Source
        Where the factor comes from.

    Raises
    ------
    MismatchError
        `output.weight` is no longer NVFP4, beside which alone llama.cpp looks for `output.scale`
        (the end of `load_tensors`; in a layer it does so for any type).
    """
    found = [name for name in ("output.scale", "output.input_scale") if name in types]
    if found and types.get("output.weight") != "NVFP4":
        raise MismatchError(
            f"tensor {found[0]!r} of {model.path} is used by llama.cpp only where output.weight is "
            "NVFP4; keep the types (--type keep), or get that model as F16, BF16 or F32",
            tensor=found[0],
        )


def _show(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "[" + ", ".join(map(str, shape)) + "]"
