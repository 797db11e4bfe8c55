"""Choose the next token, by llama.cpp's own samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from edgemerge.runtime.llama import Context, Model

__all__ = ["MAX_SEED", "Sampler", "Sampling"]

MAX_SEED = 2**32 - 2  # 2**32 - 1 is llama.cpp's word for a seed by chance (LLAMA_DEFAULT_SEED)
_PENALTY_WINDOW = 64  # tokens, as llama.cpp's tools have it (penalty_last_n in common.h)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn; the defaults are those of llama.cpp's tools (common_params_sampling).

    Attributes
    ----------
    temperature : float
        0 takes the likeliest token each time; the more above it, the flatter the probabilities.
    top_k : int
        Only the k likeliest tokens; 0 for all.
    top_p : float
        Only the likeliest tokens that have this probability together; 1 for all.
    min_p : float
        Only tokens with at least this share of the likeliest one's probability; 0 for all.
    repeat_penalty : float
        What the logit of a token among the last 64 is divided by (times, if negative); 1 for none.
    seed : int
        Of the draw, 0 to MAX_SEED; the same seed gives the same text.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0


class Sampler:
    """A chain of llama.cpp's samplers, in the order of its tools; use it in a `with` statement.

    It goes on drawing from where it was: a second answer to the same prompt is another one.

    Parameters
    ----------
    model : Model
        A loaded model.
    sampling : Sampling
        How to draw.
    """

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self._api = model.api
        api = self._api
        steps = []
        if sampling.repeat_penalty != 1.0:
            steps.append(_penalties(model, sampling.repeat_penalty))
        if sampling.temperature <= 0.0:
            steps.append(api.llama_sampler_init_greedy())
        else:
            steps += [
                api.llama_sampler_init_top_k(sampling.top_k),
                api.llama_sampler_init_top_p(sampling.top_p, 1),
                api.llama_sampler_init_min_p(sampling.min_p, 1),
                api.llama_sampler_init_temp(sampling.temperature),
                api.llama_sampler_init_dist(sampling.seed),
            ]
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for step in steps:
            api.llama_sampler_chain_add(self._chain, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the chain."""
        if self._chain:
            self._api.llama_sampler_free(self._chain)
            self._chain = None

    def see(self, tokens: Sequence[int]) -> None:
        """Count tokens of the prompt as said, for the repeat penalty."""
        for token in tokens[-_PENALTY_WINDOW:]:
            self._api.llama_sampler_accept(self._chain, token)

    def sample(self, context: Context) -> int:
        """Draw a token from the last logits that a context computed, and count it as said."""
        return int(self._api.llama_sampler_sample(self._chain, context.handle, -1))


def _penalties(model: Model, repeat: float) -> Any:
    return model.api.llama_sampler_init_penalties(model.n_vocab, _PENALTY_WINDOW, repeat, 0.0, 0.0)
