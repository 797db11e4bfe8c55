"""Choose the next token, by llama.cpp's own samplers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgemerge.runtime.batch import read_logits
from edgemerge.runtime.engine.messages import Sampling
from edgemerge.runtime.llama import Model

__all__ = ["MAX_SEED", "BadGrammar", "Sampler"]

MAX_SEED = 2**32 - 2  # 2**32 - 1 is llama.cpp's word for a seed by chance (LLAMA_DEFAULT_SEED)
_BY_CHANCE = 2**32 - 1
_PENALTY_WINDOW = 64  # tokens, as llama.cpp's tools have it (penalty_last_n in common.h)
_ROOT = b"root"
# What the model's makers recommend (LLAMA_MODEL_META_KEY_SAMPLING_PENALTY_REPEAT); generation_config.json has
# it as repetition_penalty.
_OWN_PENALTY = "general.sampling.penalty_repeat"
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class BadGrammar(Exception):
    """llama.cpp cannot read a grammar."""


class Sampler:
    """A chain of llama.cpp's samplers, in the order of its tools.

    It goes on drawing from where it was: a second answer to the same prompt is another one.

    Parameters
    ----------
    model : Model
        A loaded model.
    sampling : Sampling
        How to draw.

    Attributes
    ----------
    has_penalties : bool
        Whether the tokens of the prompt count; `see` then has to tell them.

    Raises
    ------
    BadGrammar
        The grammar cannot be read.
    """

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self._api = model.api
        self._grammar: Any = None
        if sampling.grammar:
            self._grammar = _init_grammar(model, sampling.grammar)
            self._ids = np.arange(model.n_vocab, dtype=np.int32)
        repeat = _repeat_penalty(model, sampling)
        penalties = (repeat, sampling.frequency_penalty, sampling.presence_penalty)
        self.has_penalties = penalties != (1.0, 0.0, 0.0)
        self._row = ctypes.c_float * model.n_vocab
        # Of all the logits as they are, the highest: numpy finds it ten times as fast as the chain, which
        # makes a list of candidates first. Of equal ones both take the first.
        self._takes_highest = not (
            self.has_penalties or sampling.bias or sampling.temperature > 0.0
        )
        steps = _steps(model, sampling, penalties if self.has_penalties else None)
        self._chain = self._api.llama_sampler_chain_init(
            self._api.llama_sampler_chain_default_params()
        )
        for step in steps:
            self._api.llama_sampler_chain_add(self._chain, step)

    def close(self) -> None:
        """Free it."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                self._api.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def see(self, tokens: Sequence[int]) -> None:
        """Count tokens of the prompt as said, for the penalties."""
        for token in tokens[-_PENALTY_WINDOW:]:
            self._api.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any, place: int) -> int:
        """Draw a token, and count it as said.

        Parameters
        ----------
        context : pointer
            llama.cpp's context.
        place : int
            Of the logits in the last batch.

        Returns
        -------
        int
            The token; -1 where the grammar allows none.
        """
        if self._grammar is None and not self._takes_highest:
            return int(self._api.llama_sampler_sample(self._chain, context, place))
        logits = read_logits(self._api, context, place, self._row)
        token = (
            int(logits.argmax()) if self._takes_highest else self._choose(logits, (self._chain,))
        )
        if self._grammar is None:
            return token
        # Most tokens fit, and looking at one is quicker than at all: as common_sampler_sample does.
        if not self._fits(token):
            token = self._choose(logits, (self._grammar, self._chain))
            if not self._fits(token):
                return -1
        self._api.llama_sampler_accept(self._grammar, token)
        self._api.llama_sampler_accept(self._chain, token)
        return token

    def _choose(self, logits: np.ndarray, samplers: Sequence[Any]) -> int:
        candidates = np.empty(len(logits), _CANDIDATE)
        candidates["id"] = self._ids
        candidates["logit"] = logits
        candidates["p"] = 0.0
        array = self._apply(candidates, samplers)
        return int(array.data[array.selected].id)

    def _fits(self, token: int) -> bool:
        candidates = np.array([(token, 1.0, 0.0)], _CANDIDATE)
        self._apply(candidates, (self._grammar,))
        return bool(np.isfinite(candidates["logit"][0]))

    def _apply(self, candidates: np.ndarray, samplers: Sequence[Any]) -> Any:
        kind = self._api.llama_token_data
        array = self._api.llama_token_data_array(
            data=candidates.ctypes.data_as(ctypes.POINTER(kind)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        for sampler in samplers:
            self._api.llama_sampler_apply(sampler, ctypes.byref(array))
        return array


def _init_grammar(model: Model, text: str) -> Any:
    grammar = model.api.llama_sampler_init_grammar(model.vocab, text.encode(), _ROOT)
    if not grammar:
        raise BadGrammar("the grammar of the wanted format cannot be read")
    return grammar


def _repeat_penalty(model: Model, sampling: Sampling) -> float:
    """Take the penalty that is asked for, else what the model's authors say; nonsense counts as none."""
    if sampling.repeat_penalty is not None:
        return sampling.repeat_penalty
    try:
        penalty = float(model.metadata.get(_OWN_PENALTY, "1"))
    except ValueError:
        return 1.0
    return penalty if 0.01 <= penalty <= 10 else 1.0


def _steps(
    model: Model, sampling: Sampling, penalties: tuple[float, float, float] | None
) -> list[Any]:
    api = model.api
    steps = []
    if sampling.bias:
        biases = (api.llama_logit_bias * len(sampling.bias))(*sampling.bias)
        steps.append(api.llama_sampler_init_logit_bias(model.n_vocab, len(biases), biases))
    if penalties is not None:
        steps.append(api.llama_sampler_init_penalties(model.n_vocab, _PENALTY_WINDOW, *penalties))
    if sampling.temperature <= 0.0:
        return [*steps, api.llama_sampler_init_greedy()]
    seed = _BY_CHANCE if sampling.seed is None else sampling.seed
    return [
        *steps,
        api.llama_sampler_init_top_k(sampling.top_k),
        api.llama_sampler_init_top_p(sampling.top_p, 1),
        api.llama_sampler_init_min_p(sampling.min_p, 1),
        api.llama_sampler_init_temp(sampling.temperature),
        api.llama_sampler_init_dist(seed),
    ]
