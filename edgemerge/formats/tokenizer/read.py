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
from edgemerge.formats.tokenizer.bpe import bpe_vocabulary
from edgemerge.formats.tokenizer.sentencepiece_file import read_sentencepiece
from edgemerge.formats.tokenizer.special import chat_templates, special_tokens
from edgemerge.formats.tokenizer.spm import (
    adds_space,
    is_spm_json,
    spm_json_vocabulary,
    spm_vocabulary,
)
from edgemerge.formats.tokenizer.unigram import unigram_json_vocabulary, unigram_vocabulary

__all__ = ["tokenizer_metadata"]

# Model types that the converter's LlamaModel and GemmaModel take care of.
LLAMA_LIKE = ("llama", "mistral", "mixtral", "granite", "smollm3")
GEMMA = ("gemma2", "gemma3_text")
# llama.cpp ends a text with EOS in the first, and begins it with BOS in the others, by default.
UNIGRAM = encode_value("t5", "str")
BOS_BY_DEFAULT = tuple(encode_value(name, "str") for name in ("llama-bpe", "tekken"))
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
ADD_KEYS = {"bos": "add_bos_token", "eos": "add_eos_token", "sep": "add_sep_token"}


def tokenizer_metadata(
    path: Path, config: dict[str, Any], vocab_size: int, model_type: str = "llama"
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

    Raises
    ------
    FormatError
        There is no tokenizer, or one of a kind that llama.cpp cannot be told about.
    """
    tokenizer_config = _read_optional(path / "tokenizer_config.json")
    tokenizer_json = _read_optional(
        path / "tokenizer.json", max_bytes=MAX_TOKENIZER_BYTES, max_values=MAX_TOKENIZER_VALUES
    )
    try:
        return _metadata(path, config, tokenizer_config, tokenizer_json, vocab_size, model_type)
    except _MISSHAPEN as e:
        # tokenizer.json is a dozen formats in one; what does not even have their shape ends here.
        raise FormatError(
            f"its tokenizer files are built in a way edgemerge does not know ({type(e).__name__}: "
            f"{str(e)[:80]}); get them again, or convert the model to GGUF with llama.cpp",
            path=path,
        ) from e


def _read_optional(path: Path, **bounds: int) -> dict[str, Any] | None:
    return read_object(path, **bounds) if path.is_file() else None


def _metadata(
    path: Path,
    config: dict[str, Any],
    tokenizer_config: dict[str, Any] | None,
    tokenizer_json: dict[str, Any] | None,
    vocab_size: int,
    model_type: str,
) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    add_prefix_space = (tokenizer_config or {}).get("add_prefix_space")
    if add_prefix_space is not None and model_type in LLAMA_LIKE:
        keys["add_space_prefix"] = encode_value(bool(add_prefix_space), "bool")
    n_vocab: int | None = vocab_size
    if (path / "tokenizer.model").is_file():
        model = read_sentencepiece(path / "tokenizer.model")
        added = _added_tokens(tokenizer_config or {}, tokenizer_json or {}, model_type)
        if model.is_unigram:
            keys |= unigram_vocabulary(path, model, added, vocab_size)
        else:
            as_written = model_type == "phi3"
            keys |= spm_vocabulary(path, model, added, vocab_size, as_written=as_written)
    elif tokenizer_json is None:
        raise FormatError(
            "has neither tokenizer.model nor tokenizer.json; get one of them", path=path
        )
    elif tokenizer_json["model"].get("type") == "Unigram":
        keys |= unigram_json_vocabulary(path, tokenizer_json, vocab_size)
    elif is_spm_json(tokenizer_json):
        keys |= spm_json_vocabulary(path, tokenizer_json, tokenizer_config or {}, vocab_size)
        if not adds_space(tokenizer_json):
            keys["add_space_prefix"] = encode_value(False, "bool")
    else:
        keys |= bpe_vocabulary(path, tokenizer_json, tokenizer_config or {}, vocab_size, model_type)
        n_vocab = None  # the converter does not check the range of these ids, all are below it
    ids, adds = special_tokens(tokenizer_json, tokenizer_config, config, n_vocab)
    if model_type in LLAMA_LIKE and vocab_size == CODELLAMA_VOCAB:
        ids.setdefault("eot", CODELLAMA_EOT)
    if model_type in LLAMA_LIKE and vocab_size == GRANITE_VOCAB:
        adds["bos"] = False
    # transformers adds what the files say, and no more; llama.cpp needs to be told in these.
    if keys["pre"] in BOS_BY_DEFAULT:
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
    if model_type in GEMMA:
        found["tokenizer.ggml.add_space_prefix"] = encode_value(False, "bool")
    return found


def _added_tokens(
    tokenizer_config: dict[str, Any], tokenizer_json: dict[str, Any], model_type: str
) -> list[tuple[int, str, bool]]:
    """List (id, text, special) of what is added to tokenizer.model; later ones count."""
    tokens = tokenizer_config.get("added_tokens_decoder", {}).items()
    found = [(int(i), token["content"], bool(token.get("special"))) for i, token in tokens]
    if model_type == "phi3":
        found += [
            (token["id"], token["content"], bool(token.get("special")))
            for token in tokenizer_json.get("added_tokens") or []
        ]
    return found
