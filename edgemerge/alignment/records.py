"""How attention heads lie in tensors, and how those of one model are matched to another's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from edgemerge.types import Float32

__all__ = ["HeadAxis", "HeadBlocks", "HeadPlan", "LayerHeads", "Mix", "Skipped", "ValueRotations"]


@dataclass(frozen=True, slots=True)
class HeadBlocks:
    """Consecutive equal blocks along one axis of a tensor, one per query head or per KV group."""

    owner: Literal["head", "group"]
    count: int
    length: int  # rows or columns of one block


@dataclass(frozen=True, slots=True)
class HeadAxis:
    """How the heads cut a tensor; of a vector, which is one row, they cut the columns."""

    axis: Literal["rows", "columns"]
    parts: tuple[HeadBlocks, ...]  # one after the other; more than one in a fused q, k, v


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """The attention heads of one layer, and every tensor that is permuted with them."""

    layer: int
    n_heads: int
    n_kv_heads: int
    key_length: int  # rows of one head of q and k
    value_length: int  # rows of one head of v, columns of one head of o
    axes: Mapping[str, HeadAxis]  # by GGUF name


@dataclass(frozen=True, slots=True)
class Skipped:
    """A layer whose heads are left where they are, and why."""

    layer: int
    reason: str


# For each new head or group: what it is made of, as (the other model's head or group, weight).
Mix: TypeAlias = tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, slots=True)
class ValueRotations:
    """How the values of a layer's KV groups are rotated into another model's, after its heads were permuted.

    Costs are squared distances of v and o relative to their norms: 0 equal, 1 unrelated.
    """

    identity_cost: float  # of leaving values as they are
    cost: float  # of the best rotations, whether used or not
    # (n_kv_heads, value_length, value_length), orthogonal: new values are R times the old; None: they stay
    matrices: Float32 | None = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """How the heads of one layer of a model are permuted into another model's order.

    Costs are squared distances of heads relative to their norms: 0 equal, 1 unrelated.
    """

    geometry: LayerHeads  # of the model that is permuted
    reference_layer: int
    kv_groups: tuple[int, ...]  # new group g is the model's group kv_groups[g]
    heads: tuple[int, ...]  # new head h is the model's head heads[h]
    identity_cost: float  # of leaving all heads where they are
    cost: float  # of the best matching, whether used or not
    gap: float  # cost minus a lower bound of any matching's
    confidence: float  # least over groups: fraction of a group's transported mass in one target
    iterations: int
    converged: bool
    exact: bool  # whether the exact solver had to be asked
    guarded: bool  # whether the best matching gained too little, and identity is used
    soft_groups: Mix
    soft_heads: Mix
    distances: Float32 = field(repr=False, compare=False)  # (n_heads, n_heads), with their k, v
    # None: not asked for; Skipped: the layer does not allow it
    values: ValueRotations | Skipped | None = None

    @property
    def layer(self) -> int:
        """Layer of the model that is permuted."""
        return self.geometry.layer

    @property
    def is_identity(self) -> bool:
        """Whether every head stays where it is."""
        return self.heads == tuple(range(len(self.heads)))
