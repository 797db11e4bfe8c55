"""A row of the table of families: how one model type's config.json is read.

Beside it the keys of GGUF that many rows have, in the order of llama.cpp's conversion/*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemerge.formats.hub.changes import Bands
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.cuts import Cuts, no_cuts
from edgemerge.formats.hub.own_keys import Shapes, no_keys, one_kind, stated_width

__all__ = [
    "HEADS",
    "LENGTHS",
    "LINEAR_YARN",
    "LLAMA",
    "LLAMA_ROPES",
    "SCALING",
    "TEXT",
    "OwnShapes",
    "Reader",
]


@dataclass(frozen=True, slots=True)
class OwnShapes:
    """Shapes of tensors that one family alone has, by GGUF name without `blk.N.`."""

    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    in_gguf: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # where it is another

    def __or__(self, other: OwnShapes) -> OwnShapes:
        """Return the shapes of both."""
        return OwnShapes({**self.stored, **other.stored}, {**self.in_gguf, **other.in_gguf})


def _no_shapes(check: Checker, shapes: Shapes) -> OwnShapes:
    return OwnShapes()


def _no_scales(check: Checker, shapes: Shapes) -> dict[str, Bands]:
    return {}


def _as_stated(check: Checker) -> dict[str, Any]:
    return {}


def _plain_cuts(check: Checker, shapes: Shapes) -> Cuts:
    return no_cuts


@dataclass(frozen=True, slots=True)
class Reader:
    """How the config.json of one model type is read."""

    classes: tuple[str, ...]  # of `architectures`
    keys: tuple[str, ...]  # of GGUF, without the architecture's name, in the converter's order
    ropes: tuple[str, ...]  # kinds of rope scaling that llama.cpp computes for it
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation: tuple[str, str] = ("hidden_act", "silu")
    own_keys: Callable[[Checker, Shapes], dict[str, bytes]] = no_keys
    layer_kinds: Callable[[Checker, Shapes], tuple[str, ...]] = one_kind
    width: Callable[[Checker], int] = stated_width  # of the feed-forward part; 0: it has none
    eps_key: str = "rms_norm_eps"
    tie_keys: tuple[str, ...] = ("tie_word_embeddings",)  # the first that is stated counts
    states_head_dim: bool = False  # also where config.json does not
    splits_embedding: bool = False  # llama.cpp takes head_dim to be n_embd / n_head
    tied: bool | None = None  # None: as the model likes
    cuts: Callable[[Checker, Shapes], Cuts] = _plain_cuts
    # What config.json says in other words than those read here: keys that replace its own
    restate: Callable[[Checker], dict[str, Any]] = _as_stated
    own_shapes: Callable[[Checker, Shapes], OwnShapes] = _no_shapes
    # GGUF name without `blk.N.` -> factors of its rows, where the converter multiplies weights
    scales: Callable[[Checker, Shapes], Mapping[str, Bands]] = _no_scales
    # Which of `VARIANTS` it is; None: the row of `FAMILIES` that the model type names
    variant: Callable[[Checker, Shapes], str | None] = lambda check, shapes: None
    # Keys: the count of experts under the names it has had, how many work at a time, their width
    experts: tuple[tuple[str, ...], str, str] | None = None


SCALING = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.attn_factor",
)
_ROPE = (*SCALING, "rope.freq_base", "rope.freq_base_swa")
HEADS = ("attention.head_count", "attention.head_count_kv")
LENGTHS = ("attention.key_length", "attention.value_length")
TEXT = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    *HEADS,
    *_ROPE,
    "attention.layer_norm_rms_epsilon",
    "expert_count",
    "expert_used_count",
)
LLAMA = (*TEXT, *LENGTHS, "vocab_size", "rope.dimension_count")
LINEAR_YARN = ("default", "linear", "yarn")
LLAMA_ROPES = ("default", "linear", "llama3", "yarn")
