"""What a delta has become: its size, and what it lost of each kind of tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemerge.formats.architectures import layer_index
from edgemerge.merging.delta_forms import Form
from edgemerge.merging.delta_header import Making
from edgemerge.output.report import peak_rss_bytes

__all__ = ["DeltaReport", "Effort", "KindReport", "make_report"]

BITS_OF_BF16 = 16


@dataclass(frozen=True, slots=True)
class KindReport:
    """All tensors of one kind, such as attn_q of all layers."""

    kind: str
    tensors: int
    elements: int
    nbytes: int
    error: float  # root of the lost part of the energy: 0 nothing lost, 1 all

    @property
    def bits(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.nbytes / self.elements


@dataclass(frozen=True, slots=True)
class DeltaReport:
    """What was made."""

    output: Path
    out_bytes: int
    setting: tuple[str, float]
    tensors: int  # compared
    elements: int
    unchanged: int
    left_out: int  # changed, and not stored
    kept: float  # part of the energy: of the sum of squares of the change
    kinds: tuple[KindReport, ...]
    seconds: float
    workers: int
    budget_bytes: int
    peak_rss_bytes: int  # of this process
    notes: tuple[str, ...]

    @property
    def bits(self) -> float:
        """Bits of the file for each weight of the model."""
        return 8 * self.out_bytes / self.elements

    @property
    def times_smaller(self) -> float:
        """How many times smaller the file is than the expert in bf16."""
        return BITS_OF_BF16 / self.bits


@dataclass(frozen=True, slots=True)
class Effort:
    """What making a delta took."""

    seconds: float
    workers: int
    budget_bytes: int


def make_report(
    path: Path,
    making: Making,
    forms: Sequence[Form],
    lost: Sequence[float],
    effort: Effort,
    notes: Sequence[str],
) -> DeltaReport:
    """Sum up a delta.

    Parameters
    ----------
    path : Path
        The finished file.
    making : Making
        What it was made of.
    forms : sequence of Form
        Those of the changes that are stored.
    lost : sequence of float
        The energy that each of them lacks.
    effort : Effort
        What it took.
    notes : sequence of str
        What was found of the models.
    """
    changed = [one for one in making.measured if one.squares]
    stored = {form.measured.change.name: i for i, form in enumerate(forms)}
    rows: dict[str, list[tuple[int, int, float, float]]] = {}
    for one in changed:
        i = stored.get(one.change.name)
        nbytes = 0 if i is None else sum(spec.nbytes for spec in forms[i].specs())
        gone = one.squares if i is None else lost[i]
        row = one.n_elements, nbytes, gone, one.squares
        rows.setdefault(_kind(one.change.name), []).append(row)
    kinds = []
    for kind, found in rows.items():
        gone, energy = (math.fsum(row[i] for row in found) for i in (2, 3))
        elements, nbytes = (sum(int(row[i]) for row in found) for i in (0, 1))
        kinds.append(KindReport(kind, len(found), elements, nbytes, math.sqrt(gone / energy)))
    energy = math.fsum(one.squares for one in changed)
    gone = energy - math.fsum(form.measured.squares for form in forms) + math.fsum(lost)
    return DeltaReport(
        output=path,
        out_bytes=path.stat().st_size,
        setting=making.setting,
        tensors=len(making.measured),
        elements=sum(one.n_elements for one in making.measured),
        unchanged=len(making.measured) - len(changed),
        left_out=len(changed) - len(forms),
        kept=max(0.0, 1.0 - gone / energy),
        kinds=tuple(sorted(kinds, key=lambda row: -row.elements)),
        seconds=effort.seconds,
        workers=effort.workers,
        budget_bytes=effort.budget_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        notes=tuple(notes),
    )


def _kind(name: str) -> str:
    """Return what tensors of all layers have in common: attn_q of blk.3.attn_q.weight."""
    stem = name if layer_index(name) is None else name.split(".", 2)[2]
    return stem.removesuffix(".weight")
