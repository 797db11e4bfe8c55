"""Changes of low rank for a delta, found as `edgemerge.merging.extraction` finds them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from edgemerge.merging.adapter_parts import Extracted, Spool, factor_parts
from edgemerge.merging.delta_forms import LowRankForm
from edgemerge.merging.delta_pieces import Measured
from edgemerge.merging.extraction import Found, find_factors
from edgemerge.merging.low_rank import need_bytes
from edgemerge.planning.differences import Change
from edgemerge.types import Source

__all__ = ["factor_needs", "low_rank_forms"]

FACTOR_TYPE = "F16"

RunAll: TypeAlias = Callable[
    [Sequence[Change], Sequence[int], Callable[[Change, threading.Event], Found]], list[Found]
]


def factor_needs(listed: Sequence[Change], rank: int | None) -> list[int]:
    """Return the bytes that each matrix's factors take while they are found; nothing without a rank."""
    if rank is None:
        return []
    return [
        need_bytes((one.shape[0], one.shape[1]), rank) + one.block_bytes()
        for one in listed
        if not one.is_vector
    ]


def low_rank_forms(
    matrices: Sequence[Measured],
    listed: Sequence[Change],
    base: Source,
    rank: int,
    spool: Spool,
    run: RunAll,
) -> list[LowRankForm]:
    """Find the factors of all matrices; of a stack of experts, of each expert.

    Parameters
    ----------
    matrices : sequence of Measured
        Those that changed.
    listed : sequence of Change
        All changes, the experts of a stack one by one.
    base : Source
        What the delta is for.
    rank : int
        Of the factors at most.
    spool : Spool
        Takes the factors until they are written.
    run : callable
        Works on all of some changes of so many elements.
    """
    changed = {one.change.name for one in matrices}
    items = [one for one in listed if one.name in changed]
    find = partial(find_factors, spool=spool, rank=rank, energy=None)
    results = run(items, [one.shape[0] * one.shape[1] for one in items], find)
    found: dict[str, list[Extracted]] = {}
    lost = dict.fromkeys(changed, 0.0)
    for change, (extracted, kept, total) in zip(items, results, strict=True):
        lost[change.name] += total - kept
        if extracted is not None:
            found.setdefault(change.name, []).append(extracted)
    ranks = [one.rank for experts in found.values() for one in experts]
    alpha = float(max(ranks, default=1))  # only vectors may have changed
    forms = []
    for one in matrices:
        parts = factor_parts(base, found[one.change.name], spool, FACTOR_TYPE, alpha)
        forms.append(LowRankForm(one, parts, lost[one.change.name], alpha))
    return forms
