"""SentencePiece's BPE (GGUF's tokenizer model "llama"): tokenizer.model, or a tokenizer.json like it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.json_file import read_object
from edgemerge.formats.tokenizer.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    SentencePieceFile,
)

__all__ = [
    "ADDED_SCORE",
    "Vocabulary",
    "adds_space",
    "is_spm_json",
    "looks_special",
    "spm_json_vocabulary",
    "spm_vocabulary",
]

PAD_SCORE, ADDED_SCORE = -10000.0, -1000.0
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
LIKELY_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
Json = dict[str, Any]


class Vocabulary:
    """Tokens by id, of which those nobody fills in stay `[PADn]`.

    Parameters
    ----------
    n_tokens : int
        Rows of the embedding.
    """

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

    def keys(self, model: str) -> dict[str, bytes]:
        """Return the encoded `tokenizer.ggml.*` keys, for llama.cpp's tokenizer model "llama" or "t5"."""
        return {
            "model": encode_value(model, "str"),
            "pre": encode_value("default", "str"),
            "tokens": encode_value(self.tokens, "[str]"),
            "scores": encode_value(self.scores, "[f32]"),
            "token_type": encode_value(self.types, "[i32]"),
        }


def spm_vocabulary(
    path: Path,
    model: SentencePieceFile,
    added: list[tuple[int, str, bool]],
    vocab_size: int,
    *,
    as_written: bool = False,
) -> dict[str, bytes]:
    """Return the `tokenizer.ggml.*` keys of tokenizer.model (`_create_vocab_sentencepiece`).

    Parameters
    ----------
    path : Path
        The directory; its added_tokens.json counts too.
    model : SentencePieceFile
        Its tokenizer.model.
    added : list of (int, str, bool)
        Ids, texts and whether they are special, of tokens that override pieces.
    vocab_size : int
        Number of tokens to return.
    as_written : bool
        Whether added tokens are special only where they say so, as the converter has it for Phi-3.
    """
    vocabulary = Vocabulary(vocab_size)
    for i, (piece, score, kind) in enumerate(model.pieces):
        vocabulary.put(i, piece, score, NORMAL if kind == USER_DEFINED else kind)
    if (path / "added_tokens.json").is_file():
        for text, i in read_object(path / "added_tokens.json").items():
            vocabulary.put(i, text.encode(), ADDED_SCORE, USER_DEFINED)
    for i, text, special in added:
        if special or (looks_special(text) and not as_written):
            vocabulary.put(i, text.encode(), ADDED_SCORE, CONTROL)
        else:  # llama.cpp compares these with text whose spaces are spaces
            plain = text if as_written else text.replace("▁", " ")
            vocabulary.put(i, plain.encode(), ADDED_SCORE, USER_DEFINED)
    return vocabulary.keys("llama")


def looks_special(text: str) -> bool:
    """Tell a control token that its model forgot to mark as one (`does_token_look_special`)."""
    return (
        text in LIKELY_SPECIAL
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))  # DeepSeek's full-width bar
        or (text.startswith("<unused") and text.endswith(">"))
    )


def is_spm_json(tokenizer_json: Json) -> bool:
    """Tell whether a tokenizer.json is SentencePiece's BPE, by the rule of `LlamaHfVocab`."""
    model = tokenizer_json["model"]
    decoder = tokenizer_json.get("decoder") or {}
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback", False))
        and decoder.get("type") == "Sequence"
    )


def adds_space(tokenizer_json: Json) -> bool:
    """Tell whether such a tokenizer puts a space in front of a text, as SentencePiece may."""
    normalizer = tokenizer_json.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    cutter = tokenizer_json.get("pre_tokenizer") or {}
    cutters = cutter.get("pretokenizers", [cutter])
    return any(step.get("type") == "Prepend" for step in steps) or any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in cutters
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
    model, vocabulary = tokenizer_json["model"], Vocabulary(vocab_size)
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
    return vocabulary.keys("llama")


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
