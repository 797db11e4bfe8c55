"""Perplexity of a text, as llama.cpp's llama-perplexity computes it.

The text is cut into chunks of `n_ctx` tokens. Each chunk is read on its own, with the beginning-of-sequence
token in the place of its first token. Only its second half is scored. So every scored token has at least half
a chunk in front of it (`perplexity` in tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.files import refuse_device
from edgemerge.runtime.evaluation.likelihood import (
    REMEDY,
    NoNumbers,
    check_context,
    check_numbers,
    log_likelihoods,
)
from edgemerge.runtime.llama import Model

__all__ = ["Chunk", "Perplexity", "cut_text", "perplexity_of", "score_chunks"]

# Of a chunk. A float ends at 1.8e308; percentages of perplexities and ends of their intervals need room.
LARGEST = 1e300


@dataclass(frozen=True, slots=True)
class Chunk:
    """Negative log-likelihoods (nats) of a chunk's scored tokens: sum, sum of squares, number."""

    nll: float
    nll_squared: float
    n: int


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of a text.

    Attributes
    ----------
    value : float
        exp of the mean negative log-likelihood per scored token.
    stderr : float
        Its standard error, by the delta method.
    n_tokens : int
        Scored tokens.
    n_chunks : int
        Chunks of the text.
    """

    value: float
    stderr: float
    n_tokens: int
    n_chunks: int


def cut_text(
    model: Model, path: str | PathLike[str], n_ctx: int, *, purpose: str = "perplexity"
) -> list[list[int]]:
    """Tokens of a text file, in chunks; what is left after the last whole chunk is not used.

    Parameters
    ----------
    model : Model
        A loaded model.
    path : str or path
        UTF-8 text; a last line break does not count.
    n_ctx : int
        Tokens of a chunk.
    purpose : str
        What the text is for, in an error.

    Returns
    -------
    list of (n_ctx,) int

    Raises
    ------
    FormatError
        The file is a folder or no UTF-8 text, or has fewer than two chunks.
    RuntimeFailure
        The model's context is shorter than a chunk.
    """
    refuse_device(Path(path))
    if Path(path).is_dir():
        raise FormatError("is a folder; give a text file", path=path)
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:  # line breaks as they are
            text = file.read()
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 text ({error.reason})", path=path) from error
    check_context(model, n_ctx)
    tokens = model.bos + model.tokenize(text.removesuffix("\n"))
    if len(tokens) < 2 * n_ctx:
        raise FormatError(
            f"it has {len(tokens)} tokens, and {purpose} over chunks of {n_ctx} needs "
            f"{2 * n_ctx}: give a longer text, or -c",
            path=path,
        )
    return [
        model.bos + tokens[start + len(model.bos) : start + n_ctx]
        for start in range(0, len(tokens) - n_ctx + 1, n_ctx)
    ]


def score_chunks(
    model: Model, chunks: Sequence[Sequence[int]], *, skip: Collection[int] = ()
) -> Iterator[tuple[int, Chunk]]:
    """Score the second half of each chunk.

    The logits of half a chunk are in memory at a time: 256 MiB for 512 tokens and a vocabulary of 262 144.

    Parameters
    ----------
    model : Model
        A loaded model.
    chunks : sequence of (n_ctx,) int
        As `cut_text` gives them.
    skip : collection of int
        Indices of chunks that need no score.

    Yields
    ------
    (int, Chunk)
        Each chunk's index and sums.

    Raises
    ------
    NoNumbers
        The model computes NaN or infinity, or the perplexity of a chunk is too large to be told.
    """
    n_ctx = len(chunks[0])
    first = n_ctx // 2
    wanted = [position >= first for position in range(n_ctx)]
    # A chunk in one go, by llama.cpp's default attention and not `exact`: what people compare with was
    # made by llama-perplexity. On one text Gemma-3-270M had 6.856 this way, as there, 6.847 with the
    # second half in parts that take less memory, 6.885 in float32 throughout.
    with model.context(n_ctx, n_batch=n_ctx, n_outputs=n_ctx - first) as context:
        for index, chunk in enumerate(chunks):
            if index in skip:
                continue
            context.clear()
            logits = context.decode(chunk, wanted)
            after = chunk[first + 1 :]
            values = log_likelihoods(logits, range(len(after)), after)
            check_numbers(model, values)
            found = Chunk(-float(values.sum()), float((values**2).sum()), len(values))
            if found.nll > math.log(LARGEST) * found.n:
                raise NoNumbers(
                    f"{model.path}: its perplexity on a part of a text is above {LARGEST:g}, so its weights "
                    f"are {REMEDY}"
                )
            yield index, found


def perplexity_of(chunks: Iterable[Chunk]) -> Perplexity:
    """Perplexity over all chunks.

    Parameters
    ----------
    chunks : iterable of Chunk
        At least one, as `score_chunks` gives them.
    """
    chunks = list(chunks)
    n = sum(chunk.n for chunk in chunks)
    mean = sum(chunk.nll for chunk in chunks) / n
    variance = sum(chunk.nll_squared for chunk in chunks) / n - mean**2
    value = math.exp(mean)
    return Perplexity(value, value * math.sqrt(max(variance, 0.0) / (n - 1)), n, len(chunks))
