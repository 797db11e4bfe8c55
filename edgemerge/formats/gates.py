"""The gates of a mixture of experts: one row of weights for each expert of a layer.

A token goes to the experts whose rows have the largest products with its hidden state. What the modes mean
is mergekit's `mergekit/moe/router.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from edgemerge.experts import ExpertInput, Mixture
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.hidden_states import last_states
from edgemerge.formats.quants.codec import find_codec
from edgemerge.formats.tokenizer.prompts import tokenize
from edgemerge.types import Float32, Float64, Source

__all__ = ["Gates", "make_gates"]

Gates: TypeAlias = Callable[[int], Float32]
"""Layer -> (n_experts, n_embd) weights."""

Tokens: TypeAlias = Sequence[int]

EMBEDDING = "token_embd.weight"
N_UNIFORM = 12  # numbers whose sum has a variance of 1
SMALLEST = 1e-8  # of a norm, as in mergekit


def make_gates(mixture: Mixture, base: Source, seed: int, runnable: Path) -> Gates:
    """Choose the gates of all layers.

    Parameters
    ----------
    mixture : Mixture
        Its experts, prompts and mode.
    base : Source
        Open; its embeddings and vocabulary count for `cheap_embed`, and what it computes for `hidden`.
    seed : int
        Of random gates.
    runnable : Path
        The base as a GGUF file, for `hidden`.

    Raises
    ------
    RecipeError, RuntimeFailure
        As of `tokenize` and `last_states`.
    """
    shape = (len(mixture.experts), base.specs()[EMBEDDING].n_cols)
    match mixture.gate_mode:
        case "random":
            return lambda layer: _normal(shape, seed, layer)
        case "uniform_random":
            bound = math.sqrt(1.0 / shape[1])
            return lambda layer: ((2 * _uniform(shape, seed, layer) - 1) * bound).astype(np.float32)
        case "cheap_embed":
            rows = _embedded(mixture.experts, base)
            return lambda _layer: rows
    states = _hidden(mixture.experts, base, runnable)
    return lambda layer: states[layer]


def _uniform(shape: tuple[int, ...], seed: int, layer: int) -> Float64:
    """Draw numbers of [0, 1) that depend on seed and layer, the same on every machine."""
    raw = np.random.Philox(key=np.array([seed, layer], np.uint64)).random_raw(math.prod(shape))
    return np.asarray(raw >> np.uint64(11), np.float64).reshape(shape) * 2.0**-53


def _normal(shape: tuple[int, ...], seed: int, layer: int) -> Float32:
    """Draw numbers of mean 0 and variance 1, nearly normal; no function whose last bit differs is asked."""
    total = _uniform((N_UNIFORM, *shape), seed, layer).sum(axis=0)
    return np.asarray(total - N_UNIFORM / 2, np.float32)


def _embedded(experts: Sequence[ExpertInput], base: Source) -> Float32:
    """Make each gate of the embeddings of its prompts' tokens, positive less negative ones."""
    rows = []
    for positive, negative in _prompts(experts, base):
        row = _direction(base, positive)
        if negative:
            row -= _direction(base, negative)
        rows.append(_unit(row))
    return np.stack(rows).astype(np.float32)


def _direction(base: Source, prompts: Sequence[Tokens]) -> Float64:
    """Add up the embeddings of all tokens, and divide by the norm."""
    total = np.zeros(base.specs()[EMBEDDING].n_cols)
    for token in (token for prompt in prompts for token in prompt):
        total += _embedding(base, token)
    return _unit(total)


def _hidden(experts: Sequence[ExpertInput], base: Source, runnable: Path) -> Float32:
    """Make the gates of what comes into each layer at the prompts' last tokens.

    Returns (n_layers, n_experts, n_embd) float32.
    """
    prompts = _prompts(experts, base)
    n_layers = get_value(base.metadata(), f"{base.architecture}.block_count")
    assert isinstance(n_layers, int)
    n_embd = base.specs()[EMBEDDING].n_cols
    every = [prompt for pair in prompts for side in pair for prompt in side]
    found = iter(last_states(runnable, every, n_layers, n_embd))
    gates = np.empty((n_layers, len(experts), n_embd), np.float32)
    for i, pair in enumerate(prompts):
        means = [
            np.mean([np.vstack([_embedding(base, p[-1]), next(found)]) for p in side], axis=0)
            for side in pair
            if side
        ]
        states = means[0] - means[1] if len(means) > 1 else means[0]
        gates[:, i] = [_unit(state) for state in states]
    return gates


def _prompts(
    experts: Sequence[ExpertInput], base: Source
) -> list[tuple[list[Tokens], list[Tokens]]]:
    """Cut the positive and the negative prompts of each expert into tokens."""
    texts = [t for one in experts for t in (*one.positive_prompts, *one.negative_prompts)]
    tokens = iter(tokenize(base.metadata(), texts, base.path))
    return [
        ([next(tokens) for _ in one.positive_prompts], [next(tokens) for _ in one.negative_prompts])
        for one in experts
    ]


def _embedding(base: Source, token: int) -> Float64:
    spec = base.specs()[EMBEDDING]
    raw, row = np.empty(spec.row_bytes, np.uint8), np.empty(spec.n_cols, np.float32)
    base.read_rows(EMBEDDING, token, token + 1, raw)
    find_codec(spec).decode(raw, row)
    return row.astype(np.float64)


def _unit(vector: Float64) -> Float64:
    return vector / max(float(np.sqrt((vector * vector).sum())), SMALLEST)
