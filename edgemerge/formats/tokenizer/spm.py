"""SentencePiece's BPE (GGUF's tokenizer model "llama"): tokenizer.model, or a tokenizer.json like it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.json_file import read_object
from edgemerge.formats.tokenizer.added import IMAGE_TOKEN, AddedToken, special_texts
from edgemerge.formats.tokenizer.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceFile,
)

__all__ = [
    "ADDED_SCORE",
    "Vocabulary",
    "adds_space",
    "is_special_piece",
    "is_spm_json",
    "looks_special",
    "refuse_id",
    "spm_json_vocabulary",
    "spm_vocabulary",
    "user_text",
]

PAD_SCORE, ADDED_SCORE = -10000.0, -1000.0
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
LIKELY_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
Json = dict[str, Any]


class Vocabulary:
    """Tokens by id, of which those nobody fills in stay `[PADn]`.

    Parameters
    ----------
    path : Path
        The directory, named in errors.
    n_tokens : int
        Rows of the embedding.
    """

    def __init__(self, path: Path, n_tokens: int) -> None:
        self._path = path
        self.tokens = [b"[PAD%d]" % i for i in range(n_tokens)]
        self.scores = [PAD_SCORE] * n_tokens
        self.types = [UNUSED] * n_tokens

    def put(self, token_id: object, text: bytes, score: float, kind: int) -> None:
        """Fill in a token; one past the rows of the embedding is refused: the model could not read it."""
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"token id {str(token_id)[:20]!r} is not an integer >= 0")
        if token_id >= len(self.tokens):
            raise refuse_id(self._path, text.decode(errors="replace"), token_id, len(self.tokens))
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


def refuse_id(path: Path, text: str, token_id: object, n_rows: int) -> FormatError:
    """Make the error for a token that the embedding has no row for."""
    return FormatError(
        f"its tokenizer gives {text[:40]!r} the id {str(token_id)[:20]}, but the embedding has "
        f"{n_rows} rows; take the token out of the tokenizer's files, or get all files from one model",
        path=path,
    )


def spm_vocabulary(
    path: Path,
    model: SentencePieceFile,
    added: list[AddedToken],
    vocab_size: int,
    *,
    as_written: bool = False,
    may_lack_image: bool = False,
) -> dict[str, bytes]:
    """Return the `tokenizer.ggml.*` keys of tokenizer.model (`_create_vocab_sentencepiece`).

    Parameters
    ----------
    path : Path
        The directory; its added_tokens.json counts too.
    model : SentencePieceFile
        Its tokenizer.model.
    added : list of AddedToken
        Tokens that override pieces.
    vocab_size : int
        Number of tokens to return.
    as_written : bool
        Whether added tokens are special only where they say so, as the converter has it for Phi-3.
    may_lack_image : bool
        As of `added_tokens`.
    """
    vocabulary = Vocabulary(path, vocab_size)
    for i, (piece, score, kind) in enumerate(model.pieces):
        vocabulary.put(i, piece, score, NORMAL if kind == USER_DEFINED else kind)
    if (path / "added_tokens.json").is_file():
        for text, i in read_object(path / "added_tokens.json").items():
            # tokenizer_config.json has that token too, and its note
            if not (may_lack_image and text == IMAGE_TOKEN and i == vocab_size):
                vocabulary.put(i, text.encode(), ADDED_SCORE, USER_DEFINED)
    for token in added:
        text = token.text
        if not as_written and not token.in_config and is_special_piece(model, token):
            continue
        if token.special or (looks_special(text) and not as_written):
            vocabulary.put(token.id, text.encode(), ADDED_SCORE, CONTROL)
        else:
            plain = text if as_written else user_text(text)
            vocabulary.put(token.id, plain.encode(), ADDED_SCORE, USER_DEFINED)
    return vocabulary.keys("llama")


def is_special_piece(model: SentencePieceFile, token: AddedToken) -> bool:
    """Tell whether tokenizer.model has this token already, as one that no text becomes."""
    if not 0 <= token.id < len(model.pieces):
        return False
    piece, _, kind = model.pieces[token.id]
    return kind in (CONTROL, UNKNOWN) and piece == token.text.encode()


def user_text(text: str) -> str:
    """Return what llama.cpp compares with text, whose spaces are spaces."""
    return text.replace("▁", " ")


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
    path: Path,
    tokenizer_json: Json,
    tokenizer_config: Json,
    added: list[AddedToken],
    vocab_size: int,
    *,
    keeps_marks: bool = False,
) -> Vocabulary:
    """Return the tokens of such a tokenizer.json.

    As `LlamaHfVocab` but for three things it gets wrong: all its scores are alike, so that llama.cpp
    would merge from left to right instead of by rank; it does not fill up to the embedding's rows; and
    it forgets which tokens are special where tokenizer_config.json does not name them.

    Parameters
    ----------
    path : Path
        The directory, named in errors.
    tokenizer_json, tokenizer_config : dict
        The files of these names.
    added : list of AddedToken
        Tokens beside the vocabulary, or that override its own.
    vocab_size : int
        Number of tokens to return.
    keeps_marks : bool
        Whether an added token with a mark for a space is like any other, as no text has such a mark.
    """
    model, vocabulary = tokenizer_json["model"], Vocabulary(path, vocab_size)
    if max(model["vocab"].values(), default=0) >= vocab_size:
        raise FormatError(
            f"tokenizer.json has more tokens than the {vocab_size} rows of the embedding; get both "
            "files from one model",
            path=path,
        )
    scores = _scores_of_merges(model.get("merges") or [])
    named = special_texts(tokenizer_config)
    kinds = {
        token.text: CONTROL if token.special or token.text in named else USER_DEFINED
        for token in added
    }
    for text, i in model["vocab"].items():
        kind = kinds.get(text, CONTROL if text in named else NORMAL)
        if keeps_marks and kind == USER_DEFINED and "▁" in text:
            kind = NORMAL
        kind = BYTE if BYTE_TOKEN.fullmatch(text) else kind
        shown = user_text(text) if kind == USER_DEFINED else text
        vocabulary.put(i, shown.encode(), scores.get(text, 0.0), kind)
    for token in added:
        if token.text not in model["vocab"]:
            vocabulary.put(token.id, token.text.encode(), ADDED_SCORE, kinds[token.text])
    return vocabulary


def _scores_of_merges(merges: list[Any]) -> dict[str, float]:
    """Score each token by the rank of the first merge that makes it, as SentencePiece does."""
    scores: dict[str, float] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(len(scores)))
    return scores
