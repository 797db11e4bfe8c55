"""Unigram vocabularies (GGUF's tokenizer model "t5"), from tokenizer.model or tokenizer.json.

A Unigram tokenizer takes the most probable of all ways to cut a text. llama.cpp does so for its model "t5"
(`llm_tokenizer_ugm`), whatever the architecture. It has no bytes for characters that the vocabulary lacks, so
a vocabulary that has such bytes is refused. llama.cpp's converter writes it as a BPE of SentencePiece, which
cuts some words differently.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.tokenizer.added import AddedToken
from edgemerge.formats.tokenizer.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceFile,
)
from edgemerge.formats.tokenizer.spm import (
    ADDED_SCORE,
    Vocabulary,
    is_special_piece,
    looks_special,
)

__all__ = ["unigram_json_vocabulary", "unigram_vocabulary"]

Json = dict[str, Any]


def unigram_vocabulary(
    path: Path, model: SentencePieceFile, added: list[AddedToken], vocab_size: int
) -> dict[str, bytes]:
    """Return the `tokenizer.ggml.*` keys of a tokenizer.model that holds probabilities.

    Parameters
    ----------
    path : Path
        The directory, named in errors.
    model : SentencePieceFile
        Its tokenizer.model.
    added : list of AddedToken
        Tokens that override pieces.
    vocab_size : int
        Number of tokens to return.

    Raises
    ------
    FormatError
        It spells characters that it lacks as bytes.
    """
    vocabulary = Vocabulary(path, vocab_size)
    unknown = None
    for i, (piece, score, kind) in enumerate(model.pieces):
        if kind == BYTE:
            raise _refuse_bytes(path)
        if kind == UNKNOWN:
            unknown = i
        vocabulary.put(i, piece, score, kind)
    for token in added:
        if token.id == unknown or (not token.in_config and is_special_piece(model, token)):
            continue
        kind = CONTROL if token.special or looks_special(token.text) else USER_DEFINED
        vocabulary.put(token.id, token.text.encode(), ADDED_SCORE, kind)
    return _keys(
        vocabulary,
        unknown,
        adds_space=model.adds_space,
        removes_spaces=model.removes_spaces,
        charsmap=model.charsmap,
    )


def unigram_json_vocabulary(
    path: Path, tokenizer_json: Json, added: list[AddedToken], vocab_size: int
) -> dict[str, bytes]:
    """Return the `tokenizer.ggml.*` keys of a tokenizer.json of type Unigram.

    Parameters
    ----------
    path : Path
        The directory, named in errors.
    tokenizer_json : dict
        The file of this name.
    added : list of AddedToken
        Tokens beside its pieces, or that override them.
    vocab_size : int
        Number of tokens to return.

    Raises
    ------
    FormatError
        It normalises or cuts text in a way, or spells unknown characters as bytes, which llama.cpp
        cannot do.
    """
    model = tokenizer_json["model"]
    if model.get("byte_fallback"):
        raise _refuse_bytes(path)
    charsmap, merges_spaces = _read_normalizer(path, tokenizer_json.get("normalizer"))
    adds_space, drops_spaces = _read_cutter(path, tokenizer_json.get("pre_tokenizer"))
    vocabulary = Vocabulary(path, vocab_size)
    unknown = model.get("unk_id")
    for i, (piece, score) in enumerate(model["vocab"]):
        vocabulary.put(i, piece.encode(), float(score), UNKNOWN if i == unknown else NORMAL)
    for token in added:
        if token.id != unknown:
            kind = CONTROL if token.special else USER_DEFINED
            vocabulary.put(token.id, token.text.encode(), ADDED_SCORE, kind)
    return _keys(
        vocabulary,
        unknown,
        adds_space=adds_space,
        removes_spaces=merges_spaces or drops_spaces,
        charsmap=charsmap,
    )


def _keys(
    vocabulary: Vocabulary,
    unknown: int | None,
    *,
    adds_space: bool,
    removes_spaces: bool,
    charsmap: bytes,
) -> dict[str, bytes]:
    keys = vocabulary.keys("t5")
    keys["add_space_prefix"] = encode_value(adds_space, "bool")
    keys["remove_extra_whitespaces"] = encode_value(removes_spaces, "bool")
    if charsmap:
        keys["precompiled_charsmap"] = encode_value(list(charsmap), "[u8]")
    if unknown is not None:
        keys["unknown_token_id"] = encode_value(unknown, "u32")
    return keys


def _read_normalizer(path: Path, normalizer: Json | None) -> tuple[bytes, bool]:
    """Return how characters are normalised, and whether several spaces become one."""
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    charsmap, merges_spaces = b"", False
    for step in steps:
        match step.get("type"):
            case "Precompiled":
                charsmap = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
            case "Strip":
                pass  # of what merging spaces leaves at the ends, which llama.cpp drops too
            case "Replace" if step.get("pattern") == {"Regex": " {2,}"}:
                merges_spaces = True
            case kind:
                raise FormatError(
                    f"its tokenizer normalises text by {str(kind)[:40]}, which llama.cpp cannot do "
                    "for a Unigram; use a model with another tokenizer",
                    path=path,
                )
    return charsmap, merges_spaces


def _read_cutter(path: Path, cutter: Json | None) -> tuple[bool, bool]:
    """Return whether a space is put in front of a text, and whether spaces are dropped."""
    steps = cutter.get("pretokenizers", [cutter]) if cutter else []
    kinds = [step.get("type") for step in steps]
    if kinds not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        raise FormatError(
            f"its Unigram tokenizer cuts text by {', '.join(map(str, kinds))[:80] or 'nothing'}, "
            "which llama.cpp cannot do; use a model with another tokenizer",
            path=path,
        )
    scheme = steps[-1].get("prepend_scheme", "always")
    return scheme != "never" and steps[-1].get("add_prefix_space", True), len(steps) > 1


def _refuse_bytes(path: Path) -> FormatError:
    return FormatError(
        "its tokenizer is a Unigram that spells unknown characters as bytes, which llama.cpp "
        "cannot do; use a model with another tokenizer",
        path=path,
    )
