"""Log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgemerge.runtime.engine.messages import TokenScore
from edgemerge.types import Float32

__all__ = ["log_total", "score_token"]

_IMPOSSIBLE = -9999.0  # OpenAI's stand-in for minus infinity, which JSON has not


def log_total(logits: Float32) -> float:
    """Logarithm of the sum of exp(logits), (n_vocab,) float32, in float64: log-softmax is a logit less it."""
    top = float(logits.max())
    return top + float(np.log(np.exp(logits.astype(np.float64) - top).sum()))


def score_token(
    logits: Float32, token: int, n_alternatives: int, piece: Callable[[int], bytes]
) -> TokenScore:
    """Log-softmax at one position, in float64, for the tokens that are asked for.

    Parameters
    ----------
    logits : (n_vocab,) float32
        What the model predicts there.
    token : int
        The token that stands there.
    n_alternatives : int
        How many of the likeliest to name.
    piece : function
        Bytes of a token.
    """
    total = log_total(logits)

    def logprob(i: int) -> float:
        return max(float(logits[i]) - total, _IMPOSSIBLE)

    n = min(n_alternatives, logits.size)
    best = np.argpartition(-logits, n - 1)[:n] if n else np.empty(0, dtype=np.intp)
    # by token where equal, so that the same logits give the same answer
    order = sorted((int(i) for i in best), key=lambda i: (-logits[i], i))
    return TokenScore(
        token, piece(token), logprob(token), tuple((i, piece(i), logprob(i)) for i in order)
    )
