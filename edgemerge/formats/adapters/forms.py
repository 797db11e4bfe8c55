"""What GGUF makes of the tensors that a base is stored as: other rows, other columns, other values.

A change of a module's weight must become GGUF's in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import FormatError
from edgemerge.formats.adapters.adapted import without_adapters
from edgemerge.formats.architectures import KINDS_OF_MODEL
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.hub.changes import Change, plain_change
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.cuts import Cuts, Stored, no_cuts
from edgemerge.formats.hub.falcon_h1 import SCALED
from edgemerge.formats.hub.own_keys import Shapes
from edgemerge.types import Float32, Source

if TYPE_CHECKING:
    from edgemerge.formats.hub.config import HubConfig

__all__ = ["AS_STORED", "BaseForm", "Order", "repeats_embedding"]

DELTA_NETS = {"qwen35", "qwen35moe", "qwen3next"}  # architectures
# Architectures without a family here, to whose norms llama.cpp's converter adds 1
RAISED = {"gemma", "gemma-embedding", "minimax-m3", "nemotron", "step35"}
# Architecture -> GGUF names without `blk.N.` of what no GGUF of it can be traced back from
LOST = {
    "falcon-h1": SCALED,
    "chameleon": frozenset({"attn_q_norm.weight", "attn_k_norm.weight"}),  # of one head, for all
}


@dataclass(frozen=True, slots=True)
class Order:
    """Which stored row each row of GGUF is, and where GGUF has each stored group of columns.

    At most one of `half`, `starts`, `places` and `step` is given.
    """

    half: int = (
        0  # of a head, where GGUF has rotary order: its row 2 i + p is row p hd/2 + i of the head
    )
    starts: tuple[int, ...] = ()  # first stored row of each piece, as of `Cut`
    height: int = 0  # rows of a piece
    places: tuple[int, ...] = ()  # as `Cut.columns`
    step: int = 1  # stored rows from one row to the next

    def rows(self, start: int, stop: int) -> NDArray[np.intp]:
        """Return the stored rows that rows [start, stop) of GGUF are."""
        own = np.arange(start, stop) * self.step
        if self.half:
            inside = own % (2 * self.half)
            return own - inside + inside % 2 * self.half + inside // 2
        if self.starts:
            piece, inside = np.divmod(own, self.height)
            return np.asarray(self.starts, np.intp)[piece] + inside
        return own

    def columns(self, values: Float32) -> Float32:
        """Return rows as stored with their groups of columns where GGUF has them."""
        if not self.places:
            return values
        groups = values.reshape(len(values), len(self.places), -1)
        moved = np.empty_like(groups)
        moved[:, list(self.places)] = groups
        return moved.reshape(values.shape)

    def undo_rows(self, values: Float32) -> Float32:
        """Return all rows as GGUF has them in the order in which they are stored."""
        if not self.half and not self.starts and self.step == 1:
            return values
        stored = np.empty_like(values)
        stored[self.rows(0, len(values))] = values
        return stored

    def undo_columns(self, values: Float32) -> Float32:
        """Return rows as GGUF has them with their groups of columns as they are stored."""
        if not self.places:
            return values
        groups = values.reshape(len(values), len(self.places), -1)
        return np.ascontiguousarray(groups[:, list(self.places)]).reshape(values.shape)


AS_STORED = Order()


@runtime_checkable
class _Directory(Protocol):
    """`edgemerge.formats.hub.model.HubModel`, which not every merge imports."""

    @property
    def config(self) -> HubConfig:
        """What its config.json says."""

    @property
    def repeats_embedding(self) -> bool:
        """Whether it lists its embedding as a head too."""


def repeats_embedding(source: Source) -> bool:
    """Tell whether a model is a directory that lists its embedding as a head too."""
    return isinstance(source, _Directory) and source.repeats_embedding


class BaseForm:
    """The rules by which an open base came from what is stored.

    Parameters
    ----------
    base : Source
        Open. A directory states all of its rules. Of a GGUF they follow from its architecture and keys.

    Raises
    ------
    FormatError
        A GGUF states no counts by which the heads of its delta net lie.
    """

    def __init__(self, base: Source) -> None:
        base = without_adapters(base)
        self._config: HubConfig | None = None
        self.repeats_embedding = repeats_embedding(base)
        self.kinds: tuple[str, ...]
        if isinstance(base, _Directory):
            self._config, self.kinds = base.config, (base.config.kind,)
        else:
            self.kinds = tuple(
                kind
                for kind, family in KINDS_OF_MODEL.items()
                if family.architecture == base.architecture
            )
        families = [KINDS_OF_MODEL[kind] for kind in self.kinds]
        offsets = [family.norm_offset for family in families]
        self._norm_offset = max(offsets, default=float(base.architecture in RAISED))
        self._cuts: Cuts = self._config.cuts if self._config else no_cuts
        if self._config is None and base.architecture in DELTA_NETS:
            self._cuts = _delta_net_cuts(base, self.kinds[0])
        lost = LOST.get(base.architecture, frozenset())
        self._lost: frozenset[str] = frozenset() if self._config else lost

    def cut(self, layer: int | None, hf_stem: str) -> Stored | None:
        """Return what a stored matrix or vector is cut into by rules of its own; None where it is not."""
        stored = self._cuts(layer).get(hf_stem)
        if stored is None or not stored.cuts:
            return None
        is_stack = len(stored.shape) > 2 and stored.shape[1] > 1
        return None if is_stack else stored

    def change(self, stem: str) -> Change | None:
        """Return how stored values become GGUF's, by GGUF name without `blk.N.`."""
        if self._config is not None:
            return self._config.change(stem)
        return plain_change(self._norm_offset, stem)

    def is_lost(self, stem: str) -> bool:
        """Tell whether a GGUF does not state how a tensor came from what is stored, as by which factors."""
        return stem in self._lost


def _delta_net_cuts(base: Source, kind: str) -> Cuts:
    """Make the rules of a delta net of the counts that a GGUF states."""
    # Only these need what reads all families.
    from edgemerge.formats.hub.families import READERS
    from edgemerge.formats.hub.own_values import KEYS

    metadata, front = base.metadata(), base.architecture
    raw = {hf: get_value(metadata, f"{front}.{key}") for key, hf in KEYS[kind].items()}
    for key, hf in KEYS[kind].items():
        if key.startswith("ssm.") and type(raw[hf]) is not int:
            raise FormatError(
                f"states no {front}.{key}, by which the heads of its delta net lie; convert the model anew",
                path=base.path,
            )
    raw["linear_value_head_dim"] = raw["linear_key_head_dim"]
    width = get_value(metadata, f"{front}.embedding_length")
    shapes = Shapes(1, width if isinstance(width, int) else 0, 1, 1)
    found = READERS[kind].cuts(Checker(raw, base.path, {}), shapes)
    own: Mapping[str, Stored] = {
        name: stored for name, stored in found(0).items() if name.startswith("linear_attn.")
    }
    return lambda layer: own if layer is not None else {}
