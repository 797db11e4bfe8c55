"""Models whose vocabularies nearly fit, and heads that some models have and others tie.

An embedding that was padded, or got rows for added tokens, is merged by the rows that all models have. The
output keeps one model's vocabulary. A row that another model lacks counts as that model's row, so what
an expert would change of it is nothing. A model without an output head uses its embedding as head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.finding.cache import folder_name
from edgemerge.types import Recipe, Source, TensorSpec

__all__ = [
    "EMBEDDING",
    "OUTPUT",
    "TOKENS_KEY",
    "cut_rows",
    "differ_in_size",
    "find_vocabulary",
    "has_own_head",
    "has_rows_of_tokens",
    "needs_head",
    "note_templates",
    "note_vocabularies",
]

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
TOKENS_KEY, TEMPLATE_KEY = "tokenizer.ggml.tokens", "tokenizer.chat_template"
FIRST_TOKEN = 16  # byte of an encoded list of strings: two types of 4 bytes, a count of 8
MOST_RENAMED = 0.01  # of the common tokens; with more, two vocabularies have little in common
PIECE = 1 << 20  # bytes of rows that are compared at a time; one row at least


def has_rows_of_tokens(name: str) -> bool:
    """Tell whether a tensor has one row for each token."""
    return name in (EMBEDDING, OUTPUT)


def cut_rows(spec: TensorSpec, n_rows: int) -> TensorSpec:
    """Return a tensor's first rows, or all that it has of them."""
    kept = min(n_rows, spec.n_rows)
    return replace(spec, shape=(kept, *spec.shape[1:]), nbytes=kept * spec.row_bytes)


def find_vocabulary(recipe: Recipe, sources: Mapping[Path, Source]) -> Source:
    """Find the model whose tokenizer the output gets: `tokenizer_source`, or the base.

    Raises
    ------
    RecipeError
        It is none of the models, or a union whose parts do not begin alike.
    """
    reference = sources[recipe.models()[0]]
    if recipe.tokenizer_source == "base":
        return reference
    if recipe.tokenizer_source == "union":
        # max takes the first of the largest, so the base where it has them all
        largest = max(sources.values(), key=lambda source: _count(source) or 0)
        for source in sources.values():
            if not _begins_with(largest, source):
                raise RecipeError(
                    "tokenizer_source union needs vocabularies of which one begins with the others, and "
                    f"{source.path} has other tokens than {largest.path}; give base or one of the models",
                    field="tokenizer_source",
                )
        return largest if _count(largest) != _count(reference) else reference
    if (path := Path(recipe.tokenizer_source)) not in sources:
        raise RecipeError(
            f"tokenizer_source {path} is none of the models; give base or one of them",
            field="tokenizer_source",
        )
    return sources[path]


def differ_in_size(sources: Sequence[Source]) -> bool:
    """Tell whether models have different numbers of tokens; all of them must state theirs."""
    counts = {_count(source) for source in sources}
    return len(counts) > 1 and None not in counts


def note_vocabularies(owner: Source, other: Source) -> list[str]:
    """Compare a model's tokens with those that the output gets.

    Returns
    -------
    list of str
        One sentence for each difference that does not prevent the merge.

    Raises
    ------
    MismatchError
        The vocabularies are of different sizes, and not extensions of one.
    """
    ours, theirs = owner.metadata().get(TOKENS_KEY), other.metadata().get(TOKENS_KEY)
    if ours is None or theirs is None or ours == theirs:
        return []
    left, right = _count(owner) or 0, _count(other) or 0
    renamed = sum(a != b for a, b in zip(_tokens(ours), _tokens(theirs), strict=False))
    if left != right and renamed > MOST_RENAMED * min(left, right):
        specs = [source.specs().get(EMBEDDING) for source in (owner, other)]
        raise MismatchError(
            f"the vocabularies differ: {left} tokens in {owner.path} and {right} in {other.path}, and "
            f"{renamed} of those that both have are not the same; only fine-tunes of one base can be "
            "merged",
            tensor=EMBEDDING,
            shapes=tuple(spec.shape if spec else None for spec in specs),
        )
    notes = []
    if right > left:
        notes.append(
            f"{folder_name(other.path)} has {right} tokens and {folder_name(owner.path)} {left}: its last "
            f"{right - left} rows are left out"
        )
    elif right < left:
        notes.append(
            f"{folder_name(other.path)} has {right} tokens and {folder_name(owner.path)} {left}: the last "
            f"{left - right} rows, which it lacks, are merged without it"
        )
    if renamed:
        notes.append(
            f"{folder_name(other.path)} spells some tokens differently from {folder_name(owner.path)}"
        )
    return notes


def note_templates(owner: Source, sources: Sequence[Source]) -> list[str]:
    """Say that the output has no chat template though some model has one."""
    have = [folder_name(source.path) for source in sources if TEMPLATE_KEY in source.metadata()]
    if not have or TEMPLATE_KEY in owner.metadata():
        return []
    return [
        f"the output has no chat template, as {folder_name(owner.path)} has none; {have[0]} has one, "
        "and gives it as tokenizer_source"
    ]


def _count(source: Source) -> int | None:
    raw = source.metadata().get(TOKENS_KEY)
    return None if raw is None else int.from_bytes(raw[8:FIRST_TOKEN], "little")


def _tokens(raw: bytes) -> Iterator[bytes]:
    """Yield the texts of an encoded list of strings."""
    at = FIRST_TOKEN
    while at < len(raw):
        stop = at + 8 + int.from_bytes(raw[at : at + 8], "little")
        yield raw[at + 8 : stop]
        at = stop


def _begins_with(longer: Source, shorter: Source) -> bool:
    left, right = (source.metadata().get(TOKENS_KEY) for source in (longer, shorter))
    return left is None or right is None or left[FIRST_TOKEN:].startswith(right[FIRST_TOKEN:])


def needs_head(sources: Sequence[Source], *, stacked: bool) -> bool | None:
    """Tell whether the output has a head of its own.

    Parameters
    ----------
    sources : sequence of Source
        All models of a merge.
    stacked : bool
        Whether the embedding comes from one slice, and the head from another.

    Returns
    -------
    bool or None
        None where all models have a head, or none has: as they are.
    """
    with_head = [source for source in sources if OUTPUT in source.specs()]
    if len(with_head) in (0, len(sources)):
        return None
    return stacked or any(has_own_head(source) for source in with_head)


def has_own_head(source: Source) -> bool:
    """Tell whether a stored head differs from the embedding; reads both as far as they agree."""
    left, right = source.specs().get(EMBEDDING), source.specs()[OUTPUT]
    if left is None or (left.shape, left.dtype) != (right.shape, right.dtype):
        return True
    height = max(1, PIECE // left.row_bytes)
    rows = [np.empty(height * left.row_bytes, np.uint8) for _ in range(2)]
    edges = [*range(0, left.n_rows, height), left.n_rows]
    differs = False
    for start, stop in pairwise(edges):
        views = [buffer[: (stop - start) * left.row_bytes] for buffer in rows]
        for spec, view in zip((left, right), views, strict=True):
            source.read_rows(spec.name, start, stop, view)
        if not np.array_equal(views[0], views[1]):
            differs = True
            break
    for spec in (left, right):
        source.forget(spec.name)
    return differs
