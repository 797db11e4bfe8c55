"""What a server and the process of a model tell each other: plain values (`wire` sends them)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AllEmbedded",
    "Begun",
    "Chat",
    "Embedded",
    "Ended",
    "Failed",
    "Generation",
    "Piece",
    "PromptScored",
    "Sampling",
    "TokenScore",
]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes
    ----------
    temperature, top_p, min_p, top_k
        0 for the temperature takes the likeliest token; top_k 0 keeps all.
    repeat_penalty, presence_penalty, frequency_penalty : float
        Over the last 64 tokens; None for the model's own default.
    seed : int or None
        None draws one.
    bias : tuple of (int, float)
        What is added to the logits of tokens.
    grammar : str
        GBNF that the text has to follow; empty for none.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    min_p: float = 0.05
    top_k: int = 40
    repeat_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for the model's own template; what the template is given beside them in `names`."""

    messages: list[dict[str, Any]]
    names: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer that is wanted.

    Attributes
    ----------
    prompt : str, list of int, or Chat
        A text (control tokens understood, begun as the model wants it), tokens exactly as they are,
        or messages.
    max_tokens : int
        At most so many are drawn; 0 only reads the prompt.
    sampling : Sampling
        How.
    stops : tuple of str
        Texts that end the answer and are not part of it.
    n_alternatives : int or None
        Scores of the tokens are wanted, with so many of the likeliest ones; None for no scores.
    scores_prompt : bool
        Whether the prompt's tokens are scored too.
    """

    prompt: str | list[int] | Chat
    max_tokens: int
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    n_alternatives: int | None = None
    scores_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token, its text as bytes, its log-probability, and the likeliest ones at its place."""

    token: int
    piece: bytes
    logprob: float | None  # of the first token of a prompt there is none
    alternatives: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Begun:
    """A sequence was free: tokens of the prompt, and how many of them were computed before."""

    n_prompt: int
    n_reused: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Scores of the prompt's tokens, where they were wanted.

    The beginning of sequence that was put before a text is not among them. The first has no logprob, unless
    that stands before it.
    """

    scores: list[TokenScore]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that follows, complete UTF-8, and the tokens that it is made of."""

    text: str
    n_tokens: int
    scores: list[TokenScore] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete.

    Attributes
    ----------
    reason : str
        `stop` (the model or a stop text ended it), `length`, or `loop` (it repeated itself).
    n_generated : int
        Tokens that were drawn, without the one that ends a text.
    end_score : TokenScore or None
        Of the token that ended the text, where scores were wanted and there is one.
    """

    reason: str
    n_generated: int
    end_score: TokenScore | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """What the next text of a request gave: a vector (`write_vector`), or how well it answers a question."""

    value: str | float


@dataclass(frozen=True, slots=True)
class AllEmbedded:
    """There are no more texts; together they had so many tokens."""

    n_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """There is no answer, or no more of it.

    Attributes
    ----------
    reason : str
        One sentence for the client.
    status : int
        HTTP's number: 400 for a request that the model cannot take, 500, or 503 where asking again helps.
    """

    reason: str
    status: int
