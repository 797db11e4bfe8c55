"""Log-probabilities of tokens, and OpenAI's way to write them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemerge.types import Float32

__all__ = ["MAX_ALTERNATIVES", "TokenScore", "score_token", "write_logprobs"]

MAX_ALTERNATIVES = 20  # OpenAI's limit for chats
_IMPOSSIBLE = -9999.0  # OpenAI's stand-in for minus infinity, which JSON has not


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token, its log-probability (natural logarithm), and the likeliest in its place.

    `logprob` is None for a text's first token, which nothing predicts.
    """

    token: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...] = ()  # likeliest first


def score_token(logits: Float32, token: int, n_alternatives: int) -> TokenScore:
    """Log-softmax at one position, in float64, for the tokens that are asked for.

    Parameters
    ----------
    logits : (n_vocab,) float32
        What the model predicts there.
    token : int
        The token that stands there.
    n_alternatives : int
        How many of the likeliest to name.
    """
    exact = logits.astype(np.float64)
    top = float(exact.max())
    total = top + float(np.log(np.exp(exact - top).sum()))

    def logprob(i: int) -> float:
        return max(float(exact[i]) - total, _IMPOSSIBLE)

    n = min(n_alternatives, exact.size)
    best = np.argpartition(-exact, n - 1)[:n] if n else np.empty(0, dtype=np.intp)
    # by token where equal, so that the same logits give the same answer
    order = sorted((int(i) for i in best), key=lambda i: (-exact[i], i))
    return TokenScore(token, logprob(token), tuple((i, logprob(i)) for i in order))


def write_logprobs(
    scores: Sequence[TokenScore], piece: Callable[[int], bytes], offset: int, *, alternatives: bool
) -> dict[str, Any]:
    """OpenAI's `logprobs` object of a completion.

    Parameters
    ----------
    scores : sequence of TokenScore
        Of consecutive tokens.
    piece : function
        Bytes of a token.
    offset : int
        Where the first of them begins in the text, in characters.
    alternatives : bool
        Whether the likeliest tokens are wanted; the token itself then stands among them.
    """

    def text(token: int) -> str:
        return piece(token).decode("utf-8", errors="replace")

    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offsets, top = [], []
    for score in scores:
        offsets.append(offset)
        offset += len(characters.decode(piece(score.token)))
        names: dict[str, float] = {}
        if alternatives and score.logprob is not None:
            for token, logprob in (*score.alternatives, (score.token, score.logprob)):
                names.setdefault(text(token), logprob)  # two tokens may have one text
        top.append(names if score.logprob is not None else None)
    return {
        "tokens": [text(score.token) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": top,
        "text_offset": offsets,
    }
