"""Tokens that were added to a vocabulary, joined from the files that may list them.

transformers 4 lists them in tokenizer_config.json (`added_tokens_decoder`), transformers 5 in
tokenizer.json alone; `additional_special_tokens`, today `extra_special_tokens`, says of some that they
are special. A special token is one that no user's text may become, and no answer shows: CONTROL in GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AddedToken", "added_tokens", "special_texts"]

# In the tokenizer of every Gemma 3, but those without a vision tower have no row for it.
IMAGE_TOKEN = "<image_soft_token>"
ROLES = ("bos", "eos", "unk", "sep", "pad")
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One token."""

    id: int
    text: str
    special: bool
    in_config: bool  # whether tokenizer_config.json lists it


def added_tokens(
    tokenizer_json: Json | None,
    tokenizer_config: Json | None,
    vocab_size: int,
    notes: list[str],
    *,
    json_counts: bool = False,
    may_lack_image: bool = False,
) -> list[AddedToken]:
    """List what was added to a vocabulary.

    Parameters
    ----------
    tokenizer_json, tokenizer_config : dict or None
        The files of these names.
    vocab_size : int
        Rows of the embedding.
    notes : list of str
        What is left out is added to it.
    json_counts : bool
        Which counts where both list an id: tokenizer.json, as llama.cpp's converter has it for Phi-3,
        else tokenizer_config.json, as in transformers.
    may_lack_image : bool
        Whether the token that stands for an image is left out where the embedding ends before it.
    """
    config = tokenizer_config or {}
    listed = {t["id"]: t for t in (tokenizer_json or {}).get("added_tokens") or []}
    decoder = {int(i): t for i, t in (config.get("added_tokens_decoder") or {}).items()}
    joined = decoder | listed if json_counts else listed | decoder
    extra = _texts(_extra(config))
    found = []
    for i, token in joined.items():
        text = token["content"]
        if may_lack_image and i == vocab_size and text == IMAGE_TOKEN:
            notes.append(f"token {text!r} is left out, as the embedding has no row for it")
            continue
        special = bool(token.get("special")) or text in extra
        found.append(AddedToken(i, text, special, i in decoder))
    return found


def special_texts(tokenizer_config: Json) -> set[str]:
    """Return the texts that tokenizer_config.json names as special tokens, by their role or by no role."""
    return _texts(
        [*(tokenizer_config.get(f"{role}_token") for role in ROLES), *_extra(tokenizer_config)]
    )


def _extra(tokenizer_config: Json) -> list[Any]:
    found: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        stated = tokenizer_config.get(key) or []
        found += stated.values() if isinstance(stated, Mapping) else stated
    return found


def _texts(tokens: list[Any]) -> set[str]:
    texts = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return {text for text in texts if isinstance(text, str)}
