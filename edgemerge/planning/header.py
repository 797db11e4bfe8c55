"""What the header of an output says: the type of every tensor, and the metadata."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgemerge.finding.cache import folder_name
from edgemerge.formats.adapters.reference import model_name, split_reference
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.gguf.metadata import decode_value, encode_value, get_value
from edgemerge.formats.gguf.split import whole_name
from edgemerge.formats.llama_rules.mending import mend_metadata
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.filetypes import (
    FILE_TYPES,
    dominant_file_type,
    keep_types,
    stays_f32,
    tensor_types,
    unknown_type,
)
from edgemerge.formats.quants.overrides import TypeOverrides
from edgemerge.methods.method import Method
from edgemerge.planning.jobs import Draft, may_copy
from edgemerge.planning.vocabulary import Vocabulary
from edgemerge.types import Recipe, Source

__all__ = ["DROPPED_KEYS", "choose_types", "output_metadata"]

KEEP = "keep"
UNQUANTISED = ("F32", "F16", "BF16")
FULL = ("float32", "float64")  # working types that make F32 the default
TEMPLATE_KEY = "tokenizer.chat_template"
DROPPED_KEYS = re.compile(
    r"general\.(file_type|quantization_version|name)|(split|quantize|edgemerge)\..*"
)


def choose_types(
    recipe: Recipe,
    method: Method,
    drafts: Sequence[Draft],
    sources: Mapping[Path, Source],
    notes: list[str],
) -> tuple[str, dict[str, str]]:
    """Choose the file type, and from it the type of every tensor.

    Parameters
    ----------
    recipe : Recipe
        What is wanted.
    method : Method
        The recipe's.
    drafts : sequence of Draft
        The tensors of the output.
    sources : mapping of Path to Source
        The open models.
    notes : list of str
        What the user should know is added to it.

    Returns
    -------
    file_type : str
        A key of `FILE_TYPES`, or `keep`.
    types : dict
        GGUF tensor name -> ggml type name.

    Raises
    ------
    RecipeError
        No such type, or a type for a tensor that the file type does not allow.
    MismatchError
        A tensor cannot have its type.
    """
    reference = sources[recipe.models()[0]]
    specs = {draft.name: replace(draft.reference, name=draft.name) for draft in drafts}
    quantised = any(spec.dtype not in UNQUANTISED for spec in specs.values())
    default = KEEP if quantised else "F32" if recipe.dtype in FULL else "F16"
    file_type = default if recipe.out_type is None else recipe.out_type
    overrides = TypeOverrides(recipe.tensor_types)
    if file_type.lower() == KEEP:
        overrides.refuse_for(KEEP)
        copied = {
            d.name: d.reference.dtype
            for d in drafts
            if may_copy(d, method) and not d.experts[0].spec.like  # which is encoded anew
        }
        copied = {n: t for n, t in copied.items() if t not in CODECS or not stays_f32(specs[n])}
        kept, said = keep_types({n: s for n, s in specs.items() if n not in copied})
        notes += said
        return KEEP, {name: copied.get(name) or kept[name] for name in specs}
    if file_type.upper() not in FILE_TYPES:
        raise unknown_type(file_type, [*FILE_TYPES, KEEP])
    metadata = _with_block_count(reference, drafts)
    types = tensor_types(
        file_type.upper(),
        specs,
        metadata,
        reference.architecture,
        overrides=overrides,
        has_importance=recipe.imatrix is not None,
    )
    notes += [f"no tensor's type was chosen by {pattern!r}" for pattern in overrides.unused()]
    return file_type.upper(), types


def _with_block_count(reference: Source, drafts: Sequence[Draft]) -> dict[str, bytes]:
    """Return the first model's metadata with the output's number of layers."""
    layers = {layer for draft in drafts if (layer := layer_index(draft.name)) is not None}
    key = f"{reference.architecture}.block_count"
    metadata = dict(reference.metadata())
    if layers and len(layers) != get_value(metadata, key):
        metadata[key] = encode_value(len(layers), "u32")
    return metadata


def output_metadata(
    recipe: Recipe,
    method: Method,
    sources: Mapping[Path, Source],
    vocabulary: Vocabulary,
    drafts: Sequence[Draft],
    file_type: str,
    types: Mapping[str, str],
    notes: list[str],
) -> dict[str, bytes]:
    """Take the base's metadata, the output's vocabulary, and say what the output is.

    What llama.cpp would not load of it is mended, with a note.
    """
    reference = sources[recipe.models()[0]]
    metadata = {
        k: v
        for k, v in _with_block_count(reference, drafts).items()
        if not DROPPED_KEYS.fullmatch(k)
    }
    owner = vocabulary.owner
    if (size := owner.metadata().get(f"{owner.architecture}.vocab_size")) is not None:
        is_other = vocabulary.by_text and decode_value(size) != vocabulary.n_rows
        size = encode_value(vocabulary.n_rows or 0, "u32") if is_other else size
        metadata[f"{reference.architecture}.vocab_size"] = size
    metadata = {k: v for k, v in metadata.items() if not k.startswith("tokenizer.")}
    metadata |= vocabulary.metadata
    template = recipe.chat_template
    if template == "auto":
        template, said_of_template = _most_common_template(recipe, sources)
        notes += said_of_template
    if template is not None:
        metadata[TEMPLATE_KEY] = encode_value(template, "str")
    names = [_title(path) for path in recipe.models()]
    title = names[0] if len(names) == 1 else f"{method.name} merge of {', '.join(names)}"
    if recipe.mixture is not None:
        experts = (_title(expert.path) for expert in recipe.mixture.experts)
        title = f"mixture of {', '.join(dict.fromkeys(experts))}"
    metadata["general.name"] = encode_value(title, "str")
    metadata["general.file_type"] = _file_type_id(file_type, reference, drafts, types)
    if any(dtype not in UNQUANTISED for dtype in types.values()):
        metadata["general.quantization_version"] = encode_value(2, "u32")
    metadata, said = mend_metadata(metadata)
    notes += said
    return metadata


def _title(path: Path) -> str:
    """Name a model: a file without its ending."""
    reference = split_reference(path)
    base = path if reference is None else reference.base
    title = Path(whole_name(base)).stem if base.is_file() else whole_name(base)
    return title + model_name(path).removeprefix(whole_name(base))


def _most_common_template(
    recipe: Recipe, sources: Mapping[Path, Source]
) -> tuple[str | None, list[str]]:
    """Choose the chat template that most inputs have (mergekit merge.py, `_set_chat_template`).

    Returns the template without white space around it, None where no input has one, and what to say of it.
    Where several are as common, it is that of the first input, the base before the others. There mergekit
    takes them in no fixed order.
    """
    models = recipe.models()
    found = {path: get_value(sources[path].metadata(), TEMPLATE_KEY) for path in models}
    texts = {path: text.strip() for path, text in found.items() if isinstance(text, str)}
    counts = Counter(text for text in texts.values() if text)
    if not counts:
        return None, []
    template, count = counts.most_common(1)[0]
    if len(counts) == 1:
        return template, []
    owner = next(path for path, text in texts.items() if text == template)
    return template, [
        f"chat_template auto: the template of {folder_name(owner)} is taken, which {count} of "
        f"{len(models)} models have"
    ]


def _file_type_id(
    file_type: str, reference: Source, drafts: Sequence[Draft], types: Mapping[str, str]
) -> bytes:
    if file_type != KEEP:
        return encode_value(FILE_TYPES[file_type].id, "u32")
    stated = reference.metadata().get("general.file_type")
    if stated is not None and all(types[d.name] == d.reference.dtype for d in drafts):
        return stated
    return encode_value(
        dominant_file_type(types, {draft.name: draft.reference for draft in drafts}), "u32"
    )
