"""Do these models fit together? Asked before any work, answered with the tensor and both shapes."""

from __future__ import annotations

from collections.abc import Sequence

from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.metadata import get_value
from edgemerge.types import Source, TensorSpec

__all__ = ["check_models", "find_tensor", "is_constant", "same_shape"]

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
# Differences that a merge survives, but that its user should know.
TELLING_KEYS = (
    "{}.rope.freq_base",
    "{}.rope.scaling.type",
    "{}.rope.scaling.factor",
    "{}.context_length",
    "{}.attention.layer_norm_rms_epsilon",
    "{}.attention.sliding_window",
)
LAYOUT_KEY = "{}.tensor_data_layout"
KNOWN_LAYOUTS = (None, "Meta AI original pth")
# Computed from the configuration, not learnt: copied from the base, never merged.
CONSTANTS = ("rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd")


def is_constant(name: str) -> bool:
    """Tell whether a tensor is derived from the configuration rather than learnt."""
    stem = name.rpartition(".")[0]
    return stem.split(".")[-1] in CONSTANTS


def check_models(sources: Sequence[Source]) -> list[str]:
    """Compare all models with the first.

    Returns
    -------
    list of str
        One sentence for each difference that the merge survives.

    Raises
    ------
    MismatchError
        Architectures, head counts or vocabulary sizes differ.
    FormatError
        A GGUF states a tensor layout that nobody knows.
    """
    first, *others = sources
    arch = first.architecture
    for source in sources:
        layout = get_value(source.metadata(), LAYOUT_KEY.format(source.architecture))
        if layout not in KNOWN_LAYOUTS:
            raise FormatError(
                f"its tensor_data_layout {layout!r} is unknown; convert the model anew",
                path=source.path,
            )
    notes: list[str] = []
    for other in others:
        if other.architecture != arch:
            raise MismatchError(
                f"{first.path} is a {arch} model and {other.path} is a {other.architecture} model; "
                "only fine-tunes of one architecture can be merged"
            )
        _check_hyper_parameters(first, other, notes)
        _check_vocabularies(first, other, notes)
    return notes


def _check_hyper_parameters(first: Source, other: Source, notes: list[str]) -> None:
    for pattern in DECISIVE_KEYS + TELLING_KEYS:
        key = pattern.format(first.architecture)
        ours, theirs = first.metadata().get(key), other.metadata().get(key)
        if ours is None or theirs is None or ours == theirs:
            continue
        left, right = get_value(first.metadata(), key), get_value(other.metadata(), key)
        if left == right:  # the same number in another integer type
            continue
        if pattern in DECISIVE_KEYS:
            raise MismatchError(
                f"{key} is {left} in {first.path} and {right} in {other.path}; "
                "only fine-tunes of one base can be merged"
            )
        notes.append(f"{key} is {left} in {first.path.name} and {right} in {other.path.name}")


def _check_vocabularies(first: Source, other: Source, notes: list[str]) -> None:
    key = "tokenizer.ggml.tokens"
    ours, theirs = first.metadata().get(key), other.metadata().get(key)
    if ours is None or theirs is None or ours == theirs:
        return
    left, right = (int.from_bytes(raw[8:16], "little") for raw in (ours, theirs))
    if left != right:
        embeddings = [source.specs().get("token_embd.weight") for source in (first, other)]
        shapes = tuple(spec.shape if spec else None for spec in embeddings)
        raise MismatchError(
            f"the vocabularies differ: {left} tokens in {first.path} and {right} in {other.path} "
            f"(token_embd.weight {_show(shapes[0])} and {_show(shapes[1])}); "
            "give all models the base's tokenizer first",
            tensor="token_embd.weight",
            shapes=shapes,
        )
    notes.append(f"{other.path.name} spells some tokens differently from {first.path.name}")


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


def find_tensor(source: Source, name: str) -> TensorSpec:
    """Look a tensor up in one model.

    Raises
    ------
    MismatchError
        The model lacks it.
    """
    specs = source.specs()
    if name not in specs:
        raise MismatchError(
            f"tensor {name!r} is missing in {source.path}; only fine-tunes of one base can be "
            "merged",
            tensor=name,
        )
    return specs[name]


def _show(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "[" + ", ".join(map(str, shape)) + "]"
