"""One row of the table of families: how the config.json of a model type is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.layouts import Layout, no_layout
from edgemerge.formats.hub.own_keys import Shapes, no_keys, one_kind, stated_width

__all__ = ["Reader"]


def plain_layout(check: Checker, shapes: Shapes) -> Layout:
    """Return the layout of a family whose tensors are as the common rules have them."""
    return no_layout


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
    layout: Callable[[Checker, Shapes], Layout] = plain_layout
    width: Callable[[Checker], int] = stated_width  # of the feed-forward part; 0: it has none
    eps_key: str = "rms_norm_eps"
    tie_keys: tuple[str, ...] = ("tie_word_embeddings",)  # the first that is stated counts
    states_head_dim: bool = False  # also where config.json does not
    splits_embedding: bool = False  # llama.cpp takes head_dim to be n_embd / n_head
    tied: bool | None = None  # None: as the model likes
    # Keys: the count of experts under the names it has had, how many work at a time, their width
    experts: tuple[tuple[str, ...], str, str] | None = None
