"""The tokenizer of a Hugging Face directory as GGUF's `tokenizer.*` keys, without transformers.

Which kind a directory holds is decided as `LlamaModel.set_vocab` of llama.cpp's conversion/llama.py
does: tokenizer.model, else a tokenizer.json with byte fallback, else byte-level BPE; but a Unigram
is recognised in both files.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.json_file import read_object
from edgemerge.formats.tokenizer.added import added_tokens
from edgemerge.formats.tokenizer.bpe import bpe_vocabulary
from edgemerge.formats.tokenizer.gemma4 import gemma4_keys
from edgemerge.formats.tokenizer.sentencepiece_file import UNUSED, read_sentencepiece
from edgemerge.formats.tokenizer.special import chat_templates, special_tokens
from edgemerge.formats.tokenizer.spm import (
    adds_space,
    is_spm_json,
    spm_json_vocabulary,
    spm_vocabulary,
)
from edgemerge.formats.tokenizer.unigram import unigram_json_vocabulary, unigram_vocabulary

__all__ = ["ADD_KEYS", "BOS_BY_DEFAULT", "ID_KEYS", "MAX_TOKENIZER_BYTES", "tokenizer_metadata"]

# Model types that the converter's LlamaModel and GemmaModel take care of.
LLAMA_LIKE: tuple[str, ...] = (
    "llama",
    "mistral",
    "ministral3",
    "mixtral",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "smollm3",
)
GEMMA4 = ("gemma4_text",)
GEMMA = ("gemma2", "gemma3_text", "gemma3n_text", *GEMMA4)
# llama.cpp ends a text with EOS in the first, and begins it with BOS in the others, by default.
UNIGRAM = encode_value("t5", "str")
BOS_BY_DEFAULT = tuple(
    encode_value(name, "str") for name in ("llama-bpe", "tekken", "lfm2", "falcon-h1")
)
# CodeLlama's end of an infill is named nowhere; the converter knows it by the vocabulary's size.
CODELLAMA_VOCAB, CODELLAMA_EOT = 32016, 32010
GRANITE_VOCAB = 49152  # also SmolLM's: none of these wants a BOS
ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelt so in gguf-py/gguf/constants.py
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
# Gemma 3's has 33 MB and two million values: 262 144 tokens, and 514 906 merges of two texts each.
MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES = 100_000_000, 4_000_000
# What indexing and encoding raise on JSON of another shape; FormatError is none of them.
_MISSHAPEN = (
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
ENDS = ("eos", "eot", "eom")
ADD_KEYS = {"bos": "add_bos_token", "eos": "add_eos_token", "sep": "add_sep_token"}


def tokenizer_metadata(
    path: Path,
    config: dict[str, Any],
    vocab_size: int,
    model_type: str = "llama",
    *,
    notes: list[str] | None = None,
) -> dict[str, bytes]:
    """Return the encoded `tokenizer.*` keys of a directory.

    Parameters
    ----------
    path : Path
        The directory.
    config : dict
        Its config.json, which may name token ids.
    vocab_size : int
        Rows of the embedding; missing tokens are filled up with `[PADn]`.
    model_type : str
        config.json's; llama.cpp's converter treats a vocabulary a little differently in each.
    notes : list of str, optional
        What is left out, one sentence each, is added to it.

    Raises
    ------
    FormatError
        There is no tokenizer, or one of a kind that llama.cpp cannot be told about.
    """
    tokenizer_config = _read_optional(path / "tokenizer_config.json")
    tokenizer_json = _read_optional(
        path / "tokenizer.json", max_bytes=MAX_TOKENIZER_BYTES, max_values=MAX_TOKENIZER_VALUES
    )
    notes = [] if notes is None else notes
    try:
        return _metadata(
            path, config, tokenizer_config, tokenizer_json, vocab_size, model_type, notes
        )
    except _MISSHAPEN as e:
        # tokenizer.json is a dozen formats in one; what does not even have their shape ends here.
        raise FormatError(
            f"its tokenizer files are built in a way edgemerge does not know ({type(e).__name__}: "
            f"{str(e)[:80]}); get them again, or give a GGUF of the model",
            path=path,
        ) from e


def _read_optional(path: Path, **bounds: Any) -> dict[str, Any] | None:
    return read_object(path, **bounds) if path.is_file() else None


def _metadata(
    path: Path,
    config: dict[str, Any],
    tokenizer_config: dict[str, Any] | None,
    tokenizer_json: dict[str, Any] | None,
    vocab_size: int,
    model_type: str,
    notes: list[str],
) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    add_prefix_space = (tokenizer_config or {}).get("add_prefix_space")
    if add_prefix_space is not None and model_type in LLAMA_LIKE:
        keys["add_space_prefix"] = encode_value(bool(add_prefix_space), "bool")
    as_written = model_type == "phi3"
    may_lack_image = model_type in GEMMA
    added = added_tokens(
        tokenizer_json,
        tokenizer_config,
        vocab_size,
        notes,
        json_counts=as_written,
        may_lack_image=may_lack_image,
    )
    if (path / "tokenizer.model").is_file() and model_type not in GEMMA4:
        model = read_sentencepiece(path / "tokenizer.model")
        if model.is_unigram:
            keys |= unigram_vocabulary(path, model, added, vocab_size)
        else:
            keys |= spm_vocabulary(
                path,
                model,
                added,
                vocab_size,
                as_written=as_written,
                may_lack_image=may_lack_image,
            )
    elif tokenizer_json is None:
        raise FormatError(
            "has no tokenizer.json; get it"
            if model_type in GEMMA4
            else "has neither tokenizer.model nor tokenizer.json; get one of them",
            path=path,
        )
    elif tokenizer_json["model"].get("type") == "Unigram":
        keys |= unigram_json_vocabulary(path, tokenizer_json, added, vocab_size)
    elif is_spm_json(tokenizer_json):
        vocabulary = spm_json_vocabulary(
            path,
            tokenizer_json,
            tokenizer_config or {},
            added,
            vocab_size,
            keeps_marks=model_type in GEMMA4,
        )
        if model_type in GEMMA4:
            keys |= gemma4_keys(vocabulary, tokenizer_json)
        else:
            keys |= vocabulary.keys("llama")
        if not adds_space(tokenizer_json) and model_type not in GEMMA:
            keys["add_space_prefix"] = encode_value(False, "bool")
    else:
        keys |= bpe_vocabulary(path, tokenizer_json, added, vocab_size, model_type, notes)
    stated = _without_negative(config, notes)
    ids, adds = special_tokens(tokenizer_json, tokenizer_config, stated, None)
    _check_ids(path, ids, keys["token_type"], vocab_size)
    if model_type in LLAMA_LIKE and vocab_size == CODELLAMA_VOCAB:
        ids.setdefault("eot", CODELLAMA_EOT)
    if model_type in LLAMA_LIKE and vocab_size == GRANITE_VOCAB:
        adds["bos"] = False
    # transformers adds what the files say, and no more; llama.cpp needs to be told in these.
    if keys.get("pre") in BOS_BY_DEFAULT:
        adds.setdefault("bos", False)
    if keys["model"] == UNIGRAM:
        adds.setdefault("eos", False)
    keys |= {ID_KEYS[kind]: encode_value(i, "u32") for kind, i in ids.items() if kind in ID_KEYS}
    keys |= {
        ADD_KEYS[kind]: encode_value(v, "bool") for kind, v in adds.items() if kind in ADD_KEYS
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {
        f"tokenizer.{key}": value for key, value in chat_templates(path, tokenizer_config).items()
    }
    if _is_older_template(tokenizer_config, found):
        notes.append("chat_template.jinja counts, not the other template in tokenizer_config.json")
    if model_type in GEMMA:
        found["tokenizer.ggml.add_space_prefix"] = encode_value(False, "bool")
    if model_type in GEMMA4:  # llama.cpp does so whatever it is told
        found["tokenizer.ggml.add_bos_token"] = encode_value(True, "bool")
    return found


def _is_older_template(tokenizer_config: dict[str, Any] | None, found: dict[str, bytes]) -> bool:
    """Tell whether tokenizer_config.json has a template that is not the one that was taken."""
    stated = (tokenizer_config or {}).get("chat_template")
    taken = found.get("tokenizer.chat_template")
    return isinstance(stated, str) and taken != encode_value(stated, "str")


def _without_negative(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Leave out ids below 0, by which some programs say that there is no such token."""
    absent = [
        key
        for key, value in config.items()
        if key.endswith("_token_id") and type(value) is int and value < 0
    ]
    notes += [f"{key} {config[key]} of config.json is taken for none" for key in absent]
    return {key: value for key, value in config.items() if key not in absent}


def _check_ids(path: Path, ids: dict[str, int], types: bytes, vocab_size: int) -> None:
    """Refuse a special token that the embedding lacks, and an end of text that has no text.

    `types` is the encoded array of int32; its elements begin at byte 16.
    """
    for kind, i in ids.items():
        if i >= vocab_size:
            raise FormatError(
                f"its {kind} token has the id {i}, but the embedding has {vocab_size} rows; correct "
                "it in config.json and the tokenizer's files",
                path=path,
            )
        if kind in ENDS and struct.unpack_from("<i", types, 16 + 4 * i)[0] == UNUSED:
            raise FormatError(
                f"its {kind} token has the id {i}, to which its tokenizer gives no text; get "
                "tokenizer.json and tokenizer_config.json of this very model",
                path=path,
            )
