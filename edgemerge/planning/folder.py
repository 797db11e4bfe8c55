"""What a Hugging Face directory will hold beside weights: configuration, tokenizer, generation settings.

From a directory they are its own files, with what the merge changes. From a GGUF they are made of its
metadata, where that says enough.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemerge.errors import RecipeError
from edgemerge.finding.cache import folder_name
from edgemerge.formats.adapters.adapted import without_adapters
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.constants import is_constant
from edgemerge.formats.files import read_bounded
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.hub.changes import Change
from edgemerge.formats.hub.config import HubConfig, check_config
from edgemerge.formats.hub.families import READERS
from edgemerge.formats.hub.files import CONFIG, GENERATION, TOKENIZER_FILES
from edgemerge.formats.hub.made_config import make_config
from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.hub.placement import list_units
from edgemerge.formats.hub.stored_names import StoredNames
from edgemerge.formats.quants.codec import find_codec
from edgemerge.formats.tokenizer.read import MAX_TOKENIZER_BYTES
from edgemerge.formats.tokenizer.written_process import write_tokenizer
from edgemerge.planning.jobs import Draft
from edgemerge.planning.vocabulary import EMBEDDING, OUTPUT
from edgemerge.types import Float32, Recipe, Source, TensorSpec

__all__ = ["Folder", "FolderFiles", "find_ends"]

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPE_KEYS = ("dtype", "torch_dtype")
# Of other programs, of a vision tower, or of what the output no longer is.
DROPPED = (
    "_name_or_path",
    "auto_map",
    "quantization",
    "quantization_config",
    "text_config",
    "vision_config",
)
BY_LAYER = ("layer_types", "no_rope_layers")  # lists that transformers makes where they are missing
TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
# Texts that llama.cpp takes for the end of a turn where no key states it (llama-vocab.cpp), but for the ends
# of documents. <|end|> ends a turn of Phi-3's; in gpt-oss, which has <|return|>, only a message.
MESSAGE_END, ANSWER_END = "<|end|>", "<|return|>"
TURN_ENDS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
}
TEMPLATE_KEY, TEMPLATE_FILE = "tokenizer.chat_template", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
VOCABULARY = tuple(f"tokenizer.ggml.{key}" for key in ("model", "tokens", "token_type", "merges"))


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """What is known of a directory before the merge."""

    config: HubConfig
    files: Mapping[str, bytes]  # name -> content, of all but weights, index and model card
    notes: tuple[str, ...]  # what is left out, one sentence each


class Folder:
    """A directory that a recipe asks for.

    Parameters
    ----------
    recipe : Recipe
        The recipe.
    base, owner : Source
        The open models that the output is a copy of, but for weights, and whose tokenizer it has.

    Raises
    ------
    FormatError
        The base is of a kind that no directory can be made of.
    """

    def __init__(self, recipe: Recipe, base: Source, owner: Source) -> None:
        self._recipe = recipe
        self._base, self._owner = without_adapters(base), without_adapters(owner)
        self._config = _find_config(self._base)
        self._names = StoredNames(self._config)

    def holds(self, name: str) -> bool:
        """Tell whether the directory has a tensor: no constant, and none that nothing uses."""
        return not is_constant(name) and not self._names.is_unused(name)

    def change(self, name: str) -> Change | None:
        """Return how the values that are stored differ from those of a tensor."""
        return self._config.change(name if layer_index(name) is None else name.split(".", 2)[2])

    def choose_types(self, drafts: Sequence[Draft]) -> tuple[str, dict[str, str]]:
        """Choose the type of all tensors: the recipe's, or that of the base's largest tensor.

        Raises
        ------
        RecipeError
            A directory cannot have that type, or different types.
        """
        wanted = self._recipe.out_type
        if self._recipe.tensor_types or self._recipe.imatrix is not None:
            raise RecipeError(
                "a Hugging Face directory has one type and is not quantised; leave out --tensor-type "
                "and --imatrix, or write a GGUF",
                field="type",
            )
        if wanted is None:
            largest = max(drafts, key=lambda draft: draft.reference.n_elements).reference.dtype
            full = self._recipe.dtype in ("float32", "float64")
            kept = "BF16" if largest == "MXFP4" else largest  # which has all values of MXFP4
            wanted = "F32" if full else kept if kept in DTYPES else "F16"
        if wanted.upper() not in DTYPES:
            raise RecipeError(
                f"a Hugging Face directory is written as {', '.join(DTYPES)}, not {wanted}; give one "
                "of these with --type, or write a GGUF",
                field="type",
            )
        return wanted.upper(), dict.fromkeys((draft.name for draft in drafts), wanted.upper())

    def describe(
        self, specs: Sequence[TensorSpec], metadata: Mapping[str, bytes], file_type: str
    ) -> FolderFiles:
        """Make the small files.

        Parameters
        ----------
        specs : sequence of TensorSpec
            All tensors of the output.
        metadata : mapping of GGUF key to typed value
            As a GGUF of the output would have it.
        file_type : str
            From `choose_types`.

        Raises
        ------
        FormatError
            The family has no directory that holds this model, or its tokenizer cannot be written.
        """
        raw = _output_config(self._config, specs, metadata, file_type)
        if self._owner is not self._base:
            raw |= _token_ids(metadata)
        config = check_config(raw, self._base.path / CONFIG)
        list_units(config, specs)
        files, notes = {CONFIG: _as_json(raw)}, list[str]()
        if isinstance(self._owner, HubModel) and _has_tokens_of(self._owner, metadata):
            files |= _copy_tokenizer(self._owner, metadata)
            if (self._owner.path / MORE_TEMPLATES).is_dir():
                notes.append(f"{folder_name(self._owner.path)}: {MORE_TEMPLATES} is left out")
        else:
            files[GENERATION] = _as_json(find_ends(metadata))
            length = config.rope.context_length
            files |= write_tokenizer(self._owner.path, metadata, length)
        return FolderFiles(config, files, tuple(notes))


def _find_config(base: Source) -> HubConfig:
    if isinstance(base, HubModel):
        return base.config

    def read_f32(name: str, start: int = 0, stop: int | None = None) -> Float32:
        spec = base.specs()[name]
        n_rows = (spec.n_rows if stop is None else stop) - start
        raw_u8, values = (
            np.empty(n_rows * spec.row_bytes, np.uint8),
            np.empty(n_rows * spec.n_cols, np.float32),
        )
        base.read_rows(name, start, start + n_rows, raw_u8)
        find_codec(spec).decode(raw_u8, values)
        return values

    return make_config(base.path, base.metadata(), base.specs(), read_f32)


def _output_config(
    base: HubConfig, specs: Sequence[TensorSpec], metadata: Mapping[str, bytes], file_type: str
) -> dict[str, Any]:
    """Change the base's config.json to what the output is."""
    reader = READERS[base.model_type]
    raw = {key: value for key, value in base.raw.items() if key not in DROPPED}
    raw["architectures"] = [reader.classes[0]]
    stated = [key for key in DTYPE_KEYS if key in raw] or ["torch_dtype"]
    raw |= dict.fromkeys(stated, DTYPES[file_type])
    found = {spec.name: spec for spec in specs}
    raw["vocab_size"] = found[EMBEDDING].n_rows
    n_layers = get_value(metadata, f"{base.family.architecture}.block_count")
    if raw.get("num_hidden_layers") != n_layers:
        raw["num_hidden_layers"] = n_layers
        raw = {key: value for key, value in raw.items() if key not in BY_LAYER}
    for key in [key for key in reader.tie_keys if key in raw] or reader.tie_keys[-1:]:
        raw[key] = OUTPUT not in found
    return raw


def _token_ids(metadata: Mapping[str, bytes]) -> dict[str, Any]:
    ids = {name: get_value(metadata, f"tokenizer.ggml.{key}") for name, key in TOKEN_IDS.items()}
    return {f"{name}_token_id": value for name, value in ids.items()}


def find_ends(metadata: Mapping[str, bytes]) -> dict[str, Any]:
    """Say where a text begins and where an answer ends: at a turn's end too, if that has a token."""
    ids = {name: value for name, value in _token_ids(metadata).items() if value is not None}
    eos = ids.get("eos_token_id")
    turns = [turn for turn in _turn_ends(metadata) if turn != eos]
    ends = turns if eos is None else [eos, *turns]
    if turns:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids


def _turn_ends(metadata: Mapping[str, bytes]) -> list[int]:
    """Find the tokens that end a turn: as stated, else by their texts, as llama.cpp does."""
    stated = get_value(metadata, "tokenizer.ggml.eot_token_id")
    if isinstance(stated, int):
        return [stated]
    tokens = get_value(metadata, "tokenizer.ggml.tokens")
    texts = list(tokens) if isinstance(tokens, Array) else []
    is_harmony = MESSAGE_END in texts and ANSWER_END in texts
    wanted = TURN_ENDS if is_harmony else {*TURN_ENDS, MESSAGE_END}
    return [i for i, text in enumerate(texts) if text in wanted]


def _has_tokens_of(owner: Source, metadata: Mapping[str, bytes]) -> bool:
    theirs = owner.metadata()
    return all(theirs.get(key) == metadata.get(key) for key in VOCABULARY)


def _copy_tokenizer(owner: HubModel, metadata: Mapping[str, bytes]) -> dict[str, bytes]:
    """Read the files of a directory's tokenizer; another chat template gets a file of its own."""
    names = [name for name in (GENERATION, *TOKENIZER_FILES) if (owner.path / name).is_file()]
    files = {name: read_bounded(owner.path / name, MAX_TOKENIZER_BYTES) for name in names}
    template = get_value(metadata, TEMPLATE_KEY)
    if template is not None and metadata[TEMPLATE_KEY] != owner.metadata().get(TEMPLATE_KEY):
        files[TEMPLATE_FILE] = str(template).encode()
    return files


def _as_json(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, indent=2, ensure_ascii=False).encode() + b"\n"
