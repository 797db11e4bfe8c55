"""OpenAI's ways to write log-probabilities of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from edgemerge.runtime.engine.messages import TokenScore

__all__ = ["write_chat_logprobs", "write_logprobs"]


def write_logprobs(
    scores: Sequence[TokenScore], offset: int, *, alternatives: bool
) -> dict[str, Any]:
    """OpenAI's `logprobs` object of a completion.

    Parameters
    ----------
    scores : sequence of TokenScore
        Of consecutive tokens.
    offset : int
        Where the first of them begins in the text, in characters.
    alternatives : bool
        Whether the likeliest tokens are wanted; the token itself then stands among them.
    """
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, top = [], []
    for score in scores:
        offsets.append(offset)
        offset += len(characters.decode(score.piece))
        names: dict[str, float] = {}
        if alternatives and score.logprob is not None:
            own = (score.token, score.piece, score.logprob)
            for _token, piece, logprob in (*score.alternatives, own):
                names.setdefault(_text(piece), logprob)  # two tokens may have one text
        top.append(names if score.logprob is not None else None)
    return {
        "tokens": [_text(score.piece) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def write_chat_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """OpenAI's `logprobs` object of a chat."""
    content = [
        {
            **_token(score.piece, score.logprob or 0.0),
            "top_logprobs": [_token(piece, logprob) for _, piece, logprob in score.alternatives],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(piece), "logprob": logprob, "bytes": list(piece)}


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", errors="replace")
