"""What a merge would lose: of one model in any merge, and of one in a merge onto a given base.

Every finding is one sentence. In a merge the base gives the metadata, the tokenizer and the chat
template, and every other model its weights alone; so what a model has beside them is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeGuard

from edgemerge.alignment.geometry import layer_geometry
from edgemerge.alignment.records import Skipped
from edgemerge.errors import EdgemergeError, MismatchError
from edgemerge.finding.cache import folder_name
from edgemerge.formats.architectures import FAMILIES, hf_name
from edgemerge.formats.constants import is_constant
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.llama_rules import find_violations
from edgemerge.formats.quants.codec import block_size, find_codec
from edgemerge.formats.quants.filetypes import keep_types
from edgemerge.planning.compatibility import (
    check_models,
    find_head,
    is_scale,
    layer_settings,
    missing_tensor,
    same_constant,
    same_scale,
    same_shape,
    same_width,
)
from edgemerge.planning.header import DROPPED_KEYS
from edgemerge.planning.vocabulary import OUTPUT, TOKENS_KEY, has_rows_of_tokens
from edgemerge.types import Source

__all__ = ["Verdict", "foresee_losses", "judge_merge"]

SHOWN = 3  # examples in one sentence


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a merge of one model onto a base would come to, one sentence each."""

    refused: tuple[str, ...]  # why there would be none
    lost: tuple[str, ...]  # what the output would not have of the model


def foresee_losses(source: Source) -> list[str]:
    """Say what any merge would refuse, change or leave out of a model; reads its header.

    Parameters
    ----------
    source : Source
        An open model.

    Returns
    -------
    list of str
        One sentence each; empty for an unquantised model of a known architecture.
    """
    return [
        *_kind(source),
        *_faults(source),
        *_types(source),
        *_scales(source),
        *_unusual_tensors(source),
        *_layers(source),
        *_dropped_keys(source),
    ]


def _kind(source: Source) -> Iterator[str]:
    try:
        check_models([source])
    except EdgemergeError as error:
        yield str(error)
    else:
        kind = get_value(source.metadata(), "general.type", "model")
        if kind != "model":
            yield f"it says that it is of type {kind}, and only whole models are merged"


def _faults(source: Source) -> Iterator[str]:
    """Say why llama.cpp does not run a file; a directory is not run, and what is made of it is mended."""
    if source.path.is_dir():
        return
    for violation in find_violations(source.metadata(), source.specs(), source.architecture):
        end = "what is written is mended" if violation.is_mended else "nor what is made of it"
        yield f"llama.cpp cannot run it, as it {violation}: {end}"


def _types(source: Source) -> Iterator[str]:
    try:
        yield from keep_types(source.specs())[1]
    except MismatchError as error:
        yield str(error)
    if quantised := _quantised_elements(source):
        percent = 100 * quantised / sum(spec.n_elements for spec in source.specs().values())
        yield (
            f"{percent:.0f} % of the parameters are quantised: a merge decodes them, and rounds anew "
            "what it writes; give the unquantised model where you have it"
        )


def _quantised_elements(source: Source) -> int:
    specs = source.specs().values()
    return sum(spec.n_elements for spec in specs if block_size(spec.dtype)[0] > 1)


def _scales(source: Source) -> Iterator[str]:
    if found := [name for name in source.specs() if is_scale(name, source)]:
        yield (
            f"{_tensors(found)} beside weights as their factors: such weights are merged only with "
            "those of a model that has the same factors"
        )


def _unusual_tensors(source: Source) -> Iterator[str]:
    if source.architecture in {family.architecture for family in FAMILIES.values()}:
        found = [
            name
            for name in source.specs()
            if hf_name(source.architecture, name) is None
            and not is_constant(name)
            and not is_scale(name, source)
        ]
        if found:
            yield (
                f"{_tensors(found)} that other {source.architecture} models do not have: only models "
                "that have the same can be merged"
            )
    if found := [name for name in source.specs() if is_constant(name)]:
        yield f"{_tensors(found)} computed from the configuration: a merge takes the base's"


def _layers(source: Source) -> Iterator[str]:
    arch = source.architecture
    count = get_value(source.metadata(), f"{arch}.block_count")
    if keys := layer_settings(source.metadata(), count):
        yield (
            "slices can neither change the number of its layers nor re-order those that differ: it has "
            f"settings per layer ({_listed([*keys])})"
        )
    reasons = Counter(
        found.reason for found in layer_geometry(source) if isinstance(found, Skipped)
    )
    for reason, n_layers in reasons.items():
        yield (
            f"the attention heads of {n_layers} layer{'s' * (n_layers > 1)} are never aligned: "
            f"{reason}"
        )


def _dropped_keys(source: Source) -> Iterator[str]:
    keys = [key for key in source.metadata() if DROPPED_KEYS.fullmatch(key)]
    if own := [key for key in keys if not key.startswith(("general.", "edgemerge."))]:
        yield f"what tells how this file was made is left out ({_listed(own)})"
    if any(key.startswith("edgemerge.") for key in keys):
        yield "what it was merged from (edgemerge.…) gives way to what the new merge is made of"


# -- against a base -------------------------------------------------------------------------------


def judge_merge(base: Source, model: Source) -> Verdict:
    """Say why a model could not be merged onto a base, and what would be lost if it can.

    Parameters
    ----------
    base, model : Source
        Open models; headers are read, and tensors of a few bytes (factors, rotary constants).
    """
    return Verdict(tuple(_refusals(base, model)), tuple(_losses(base, model)))


def _refusals(base: Source, model: Source) -> Iterator[str]:
    try:
        check_models([base, model])
    except EdgemergeError as error:
        yield str(error)
    if model.architecture != base.architecture:
        return
    merged = [name for name in base.specs() if not is_constant(name)]
    known = {*base.specs(), OUTPUT}  # a tied model's head is its embedding
    extra = [name for name in model.specs() if not is_constant(name) and name not in known]
    yield from _first_and_count([missing_tensor(name, base, model) for name in extra])
    yield from _first_and_count([e for name in merged if (e := _misfit(base, model, name))])
    for source in (base, model):
        specs = [spec for spec in source.specs().values() if not is_constant(spec.name)]
        try:
            for spec in specs:
                find_codec(spec)
        except MismatchError as error:
            yield f"{source.path}: {error}"


def _misfit(base: Source, model: Source, name: str) -> MismatchError | None:
    """Try one tensor as `edgemerge.planning.jobs` does."""
    try:
        fits = same_width if has_rows_of_tokens(name) else same_shape
        fits(base.specs()[name], find_head(model, name), base, model)
        if is_scale(name, base):
            same_scale(name, base, name, model)
    except MismatchError as error:
        return error
    return None


def _first_and_count(errors: Sequence[MismatchError]) -> Iterator[str]:
    """Tell the first error in full, and how many are like it."""
    if errors:
        yield f"{errors[0]}" + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _losses(base: Source, model: Source) -> Iterator[str]:
    if model.architecture != base.architecture:
        return
    yield from _lost_bits(base, model)
    yield from _lost_tokens(base, model)
    ours, theirs = base.metadata(), model.metadata()
    own = (f"{model.architecture}.", "tokenizer.")
    ignored = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    for key in theirs:
        if not key.startswith(own) or key in ignored or ours.get(key) == theirs[key]:
            continue
        left, right = get_value(ours, key), get_value(theirs, key)
        if left == right:  # the same number in another integer type
            continue
        if key.startswith("tokenizer.chat_template"):
            yield f"its chat template ({key}): {_instead(base, 'another', key in ours)}"
        elif isinstance(right, Array) or isinstance(left, Array):
            yield f"its {key}: {_instead(base, 'another list', key in ours)}"
        else:
            yield f"its {key} of {right}: {_instead(base, str(left), key in ours)}"
    for name in filter(is_constant, model.specs()):
        if name not in base.specs():
            yield f"its {name}: {folder_name(base.path)} has none"
        elif not same_constant(name, base, model):
            yield f"its {name}: {folder_name(base.path)} has other values, which are taken"


def _instead(base: Source, value: str, is_there: bool) -> str:
    return (
        f"{folder_name(base.path)} has {value}, which is taken"
        if is_there
        else f"{folder_name(base.path)} has none"
    )


def _lost_bits(base: Source, model: Source) -> Iterator[str]:
    """Compare what is stored per parameter; a quantised base gives the output its types."""
    left, right = (_bits(source) for source in (base, model))
    if _quantised_elements(base) and left < right:
        yield (
            f"precision: it has {right:.1f} bits per parameter, and the output, where --type names no "
            f"other type, the {left:.1f} of {folder_name(base.path)}"
        )


def _bits(source: Source) -> float:
    specs = source.specs().values()
    return 8 * sum(spec.nbytes for spec in specs) / max(1, sum(spec.n_elements for spec in specs))


def _lost_tokens(base: Source, model: Source) -> Iterator[str]:
    left, right = (get_value(source.metadata(), TOKENS_KEY) for source in (base, model))
    if not _are_texts(left) or not _are_texts(right) or left == right:
        return
    changed = [theirs for ours, theirs in zip_longest(left, right) if theirs not in (ours, None)]
    known = set(left)
    if new := [str(token) for token in changed if token not in known]:
        yield (
            f"its spelling of {len(new)} token{'s' * (len(new) > 1)} that {folder_name(base.path)} does not "
            f"have: {_listed([repr(token) for token in new])}"
        )
    if len(changed) > len(new):
        yield f"its numbering of {len(changed) - len(new)} tokens that {folder_name(base.path)} has too"


def _are_texts(value: object) -> TypeGuard[Array]:
    return isinstance(value, Array) and value.is_text


# -- words ----------------------------------------------------------------------------------------


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({_listed(names)})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
