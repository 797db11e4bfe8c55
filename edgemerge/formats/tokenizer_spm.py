"""SentencePiece vocabularies: tokenizer.model, or a tokenizer.json that is one in disguise.

The first is a protobuf message, read by hand: field 1 of `ModelProto` repeats `SentencePiece`
(1 piece, 2 score, 3 type), see sentencepiece_model.proto. Nothing else of it is needed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.files import describe_foreign
from edgemerge.formats.json_file import read_object
from edgemerge.formats.metadata import encode_value

__all__ = [
    "CONTROL",
    "NORMAL",
    "UNUSED",
    "USER_DEFINED",
    "is_spm_json",
    "looks_special",
    "spm_json_vocabulary",
    "spm_vocabulary",
]

# llama_token_type of llama.cpp, which are SentencePiece's too
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PAD_SCORE, ADDED_SCORE = -10000.0, -1000.0
MAX_MODEL_BYTES = 100_000_000
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
LIKELY_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
Json = dict[str, Any]


class _Vocabulary:
    """Tokens by id, of which those nobody fills in stay `[PADn]`."""

    def __init__(self, n_tokens: int) -> None:
        self.tokens = [b"[PAD%d]" % i for i in range(n_tokens)]
        self.scores = [PAD_SCORE] * n_tokens
        self.types = [UNUSED] * n_tokens

    def put(self, token_id: object, text: bytes, score: float, kind: int) -> None:
        """Fill in a token; ids beyond the embedding are dropped, as the converter does."""
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"token id {str(token_id)[:20]!r} is not an integer >= 0")
        if token_id < len(self.tokens):
            self.tokens[token_id] = text
            self.scores[token_id] = score
            self.types[token_id] = kind

    def keys(self) -> dict[str, bytes]:
        return {
            "model": encode_value("llama", "str"),
            "pre": encode_value("default", "str"),
            "tokens": encode_value(self.tokens, "[str]"),
            "scores": encode_value(self.scores, "[f32]"),
            "token_type": encode_value(self.types, "[i32]"),
        }


def spm_vocabulary(path: Path, tokenizer_config: Json, vocab_size: int) -> dict[str, bytes]:
    """Return the `tokenizer.ggml.*` keys of tokenizer.model (`_create_vocab_sentencepiece`).

    Parameters
    ----------
    path : Path
        The directory; its added_tokens.json counts too.
    tokenizer_config : dict
        tokenizer_config.json, whose added_tokens_decoder overrides pieces.
    vocab_size : int
        Number of tokens to return.
    """
    vocabulary = _Vocabulary(vocab_size)
    for i, (piece, score, kind) in enumerate(_read_pieces(path / "tokenizer.model")):
        vocabulary.put(i, piece, score, NORMAL if kind == USER_DEFINED else kind)
    if (path / "added_tokens.json").is_file():
        for text, i in read_object(path / "added_tokens.json").items():
            vocabulary.put(i, text.encode(), ADDED_SCORE, USER_DEFINED)
    for i, token in tokenizer_config.get("added_tokens_decoder", {}).items():
        text = token["content"]
        if token.get("special") or looks_special(text):
            vocabulary.put(int(i), text.encode(), ADDED_SCORE, CONTROL)
        else:  # llama.cpp compares these with text whose spaces are spaces
            vocabulary.put(int(i), text.replace("▁", " ").encode(), ADDED_SCORE, USER_DEFINED)
    return vocabulary.keys()


def looks_special(text: str) -> bool:
    """Tell a control token that its model forgot to mark as one (`does_token_look_special`)."""
    return (
        text in LIKELY_SPECIAL
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))  # DeepSeek's full-width bar
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _read_pieces(path: Path) -> Iterator[tuple[bytes, float, int]]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MODEL_BYTES + 1)
    except OSError as e:
        raise FormatError(f"cannot be read ({e.strerror}); get the file again", path=path) from e
    if raw[:1] != b"\n" or len(raw) > MAX_MODEL_BYTES:  # the tag of field 1, always first
        raise FormatError(describe_foreign(raw[:64], "SentencePiece"), path=path)
    try:
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                yield _parse_piece(value)
    except (IndexError, UnicodeDecodeError, ValueError, struct.error) as e:
        raise FormatError(
            f"is not a SentencePiece model, or a damaged one ({e}); get the file again", path=path
        ) from e


def _parse_piece(message: bytes) -> tuple[bytes, float, int]:
    piece, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            piece = value
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    piece.decode("utf-8")
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"a piece has type {kind}")
    return piece, score, kind


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (field number, value) of one protobuf message; 64-bit values are skipped."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
                yield tag >> 3, value
            case 1:
                at += 8
            case 2:
                length, at = _varint(message, at)
                if length > len(message) - at:
                    raise ValueError("a field is longer than the file")
                yield tag >> 3, message[at : at + length]
                at += length
            case 5:
                yield tag >> 3, struct.unpack_from("<f", message, at)[0]
                at += 4
            case kind:
                raise ValueError(f"wire type {kind} is not used by SentencePiece")
    if at > len(message):
        raise ValueError("the last field is cut short")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than ten bytes")


def is_spm_json(tokenizer_json: Json) -> bool:
    """Tell whether a tokenizer.json is SentencePiece's BPE, by the rule of `LlamaHfVocab`."""
    model = tokenizer_json["model"]
    decoder = tokenizer_json.get("decoder") or {}
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback", False))
        and decoder.get("type") == "Sequence"
    )


def spm_json_vocabulary(
    path: Path, tokenizer_json: Json, tokenizer_config: Json, vocab_size: int
) -> dict[str, bytes]:
    """Return the `tokenizer.ggml.*` keys of such a tokenizer.json.

    As `LlamaHfVocab` but for two things it gets wrong: all its scores are alike, so that llama.cpp
    would merge from left to right instead of by rank, and it does not fill up to the embedding's
    rows.

    Parameters
    ----------
    path : Path
        The directory, named in errors.
    tokenizer_json, tokenizer_config : dict
        The files of these names.
    vocab_size : int
        Number of tokens to return.
    """
    model, vocabulary = tokenizer_json["model"], _Vocabulary(vocab_size)
    if max(model["vocab"].values(), default=0) >= vocab_size:
        raise FormatError(
            f"tokenizer.json has more tokens than the {vocab_size} rows of the embedding; get both "
            "files from one model",
            path=path,
        )
    scores = _scores_of_merges(model.get("merges") or [])
    special = _special_texts(tokenizer_config)
    for text, i in model["vocab"].items():
        kind = CONTROL if text in special else NORMAL
        kind = BYTE if BYTE_TOKEN.fullmatch(text) else kind
        vocabulary.put(i, text.encode(), scores.get(text, 0.0), kind)
    for token in tokenizer_json.get("added_tokens") or []:
        text = token["content"]
        if text not in model["vocab"]:
            kind = CONTROL if text in special else USER_DEFINED
            vocabulary.put(token["id"], text.encode(), ADDED_SCORE, kind)
    return vocabulary.keys()


def _scores_of_merges(merges: list[Any]) -> dict[str, float]:
    """Score each token by the rank of the first merge that makes it, as SentencePiece does."""
    scores: dict[str, float] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(len(scores)))
    return scores


def _special_texts(tokenizer_config: Json) -> set[str]:
    named = [tokenizer_config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "sep", "pad")]
    named += tokenizer_config.get("additional_special_tokens") or []
    texts = (token.get("content") if isinstance(token, dict) else token for token in named)
    return {text for text in texts if isinstance(text, str)}
