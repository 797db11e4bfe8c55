"""Which bits each tensor of a delta gets: the most energy for a size, or the least size for an energy.

Each tensor has a few codes, each with its bytes and what it would lose. Of these the lower convex hull is
taken. Its steps, from all tensors, are taken in the order of what a byte gains (Everett 1963, Lagrange
multipliers).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Option", "choose"]


@dataclass(frozen=True, slots=True)
class Option:
    """A code of one tensor; no code at all is one too."""

    dtype: str | None  # ggml type; None: the change is left out
    nbytes: int
    lost: float  # energy


@dataclass(frozen=True, slots=True)
class _Step:
    """From one option of a tensor's hull to the next larger one."""

    gain: float  # energy for each byte
    tensor: int
    option: int  # the larger one
    nbytes: int  # more than the smaller one
    energy: float


def choose(
    tensors: Sequence[Sequence[Option]], *, room: int | None = None, lost: float | None = None
) -> list[Option]:
    """Choose an option of each tensor.

    Parameters
    ----------
    tensors : sequence of sequences of Option
        For each tensor its options, one of which has no bytes.
    room : int, optional
        Bytes that all may take together.
    lost : float, optional
        Else the energy that all may lose together; where no option does, the best are taken.

    Returns
    -------
    list of Option
        One for each tensor.
    """
    hulls = [_hull(options) for options in tensors]
    steps = [step for i, hull in enumerate(hulls) for step in _steps(i, hull)]
    steps.sort(key=lambda step: (-step.gain, step.tensor, step.option))
    chosen = [0] * len(hulls)
    total = sum(hull[0].lost for hull in hulls)
    free = room if room is not None else 0
    for step in steps:
        if room is None:
            if lost is not None and total <= lost:
                break
        elif step.nbytes > free or step.option != chosen[step.tensor] + 1:
            continue  # a smaller one of another tensor may still fit
        chosen[step.tensor] = step.option
        free -= step.nbytes
        total -= step.energy
    return [hull[i] for hull, i in zip(hulls, chosen, strict=True)]


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the lower convex hull, from the smallest option on: each byte gains less than the last."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.lost)):
        if hull and option.lost >= hull[-1].lost:
            continue
        while len(hull) > 1 and _gain(hull[-2], option) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _gain(small: Option, large: Option) -> float:
    return (small.lost - large.lost) / max(1, large.nbytes - small.nbytes)


def _steps(tensor: int, hull: Sequence[Option]) -> list[_Step]:
    return [
        _Step(_gain(small, large), tensor, i, large.nbytes - small.nbytes, small.lost - large.lost)
        for i, (small, large) in enumerate(itertools.pairwise(hull), 1)
    ]
