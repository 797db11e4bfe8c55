"""Continue a prompt."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Iterator
from typing import Any

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.llama import Context, Model

__all__ = ["complete"]

_BATCH = 512  # prompt tokens per call


def complete(
    model: Model, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """Continue a prompt and yield the text as it comes.

    Parameters
    ----------
    model : Model
        A loaded model.
    prompt : str
        Text; control tokens in it (`<|im_start|>`) are understood.
    max_tokens : int
        Most tokens to add; fewer if the model ends or its context is full.
    temperature : float
        0 takes the likeliest token each time; above it, tokens are drawn from the 40 likeliest
        within 0.95 of the probability, as llama.cpp's own tools do.
    seed : int
        Of the draw; the same seed gives the same text.

    Raises
    ------
    RuntimeFailure
        The prompt is empty or leaves no room in the model's context.
    """
    tokens = model.bos + model.tokenize(prompt, special=True)
    if not tokens:
        raise RuntimeFailure("the prompt is empty: give the model at least one word to go on from")
    if len(tokens) >= model.n_ctx_train:
        raise RuntimeFailure(
            f"the prompt has {len(tokens)} tokens and the model's context is {model.n_ctx_train}: "
            "shorten the prompt"
        )
    # Checked above, at the call; a generator would only do so when its first word is asked for.
    return _stream(model, tokens, max_tokens, temperature, seed)


def _stream(
    model: Model, prompt: list[int], max_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    limit = min(max_tokens, model.n_ctx_train - len(prompt))
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sampler = _make_sampler(model.api, temperature, seed)
    try:
        with model.context(len(prompt) + max(limit, 0), n_batch=_BATCH) as context:
            pending, position = prompt, 0
            for _ in range(limit):
                _feed(context, pending, position)
                position += len(pending)
                token = model.api.llama_sampler_sample(sampler, context.handle, -1)
                if model.is_end(token):
                    break
                if text := characters.decode(model.piece(token)):
                    yield text
                pending = [token]
    finally:
        model.api.llama_sampler_free(sampler)
    if text := characters.decode(b"", final=True):
        yield text


def _feed(context: Context, tokens: list[int], position: int) -> None:
    """Run tokens through the model, with logits for the last of them."""
    for start in range(0, len(tokens), _BATCH):
        part = tokens[start : start + _BATCH]
        wanted = [False] * len(part)
        wanted[-1] = start + len(part) == len(tokens)
        first = position + start
        context.decode(part, range(first, first + len(part)), [(0,)] * len(part), wanted)


def _make_sampler(api: Any, temperature: float, seed: int) -> Any:
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    if temperature <= 0.0:
        steps = [api.llama_sampler_init_greedy()]
    else:
        steps = [
            api.llama_sampler_init_top_k(40),
            api.llama_sampler_init_top_p(0.95, 1),
            api.llama_sampler_init_temp(temperature),
            api.llama_sampler_init_dist(ctypes.c_uint32(seed).value),
        ]
    for step in steps:
        api.llama_sampler_chain_add(chain, step)
    return chain
