"""Output heads that some models have and others tie: a model without one uses its embedding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from edgemerge.planning.vocabulary import EMBEDDING, OUTPUT
from edgemerge.types import Source

__all__ = ["has_own_head", "needs_head"]

PIECE = 1 << 20  # bytes of rows that are compared at a time; one row at least


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
    if not left.row_bytes:  # without elements, which a plan refuses by name
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
