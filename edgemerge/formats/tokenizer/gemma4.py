"""Gemma 4's vocabulary: SentencePiece's tokens, merged by rank over whole lines (GGUF's model "gemma4")."""

from __future__ import annotations

from typing import Any

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.tokenizer.bpe import joined_merges
from edgemerge.formats.tokenizer.sentencepiece_file import USER_DEFINED
from edgemerge.formats.tokenizer.spm import ADDED_SCORE, Vocabulary

__all__ = ["VISIBLE", "gemma4_keys"]

# Shown, though special, so that programs can read what a model thinks and calls: `Gemma4Model.set_vocab`.
VISIBLE = frozenset(
    b'<|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'.split()
)


def gemma4_keys(vocabulary: Vocabulary, tokenizer_json: dict[str, Any]) -> dict[str, bytes]:
    """Return the `tokenizer.ggml.*` keys of a tokenizer.json.

    Parameters
    ----------
    vocabulary : Vocabulary
        Its tokens; the kinds of some are changed.
    tokenizer_json : dict
        The file, whose merges count; all scores are alike.
    """
    for i, token in enumerate(vocabulary.tokens):
        vocabulary.scores[i] = ADDED_SCORE
        if token in VISIBLE:
            vocabulary.types[i] = USER_DEFINED
    keys = vocabulary.keys("gemma4")
    del keys["pre"]
    return keys | {
        "merges": encode_value(joined_merges(tokenizer_json["model"]["merges"]), "[str]")
    }
