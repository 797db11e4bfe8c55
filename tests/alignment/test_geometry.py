"""Which layers can be aligned, which tensors move, and what is said about those that cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgemerge.alignment.geometry import layer_geometry
from edgemerge.alignment.records import HeadBlocks, LayerHeads, Skipped
from tests.support.head_models import ArraySource, head_tensors

Changes = Mapping[str, tuple[int, ...] | None]  # shape, or None: not there
Settings = Mapping[str, int | float | list[int]]


def geometry(
    changes: Changes,
    architecture: str = "llama",
    **settings: int | float | list[int],
) -> LayerHeads | Skipped:
    """Geometry of a layer of 4 heads, 2 KV, head 8, width 48, with some tensors changed."""
    tensors = head_tensors(4, 2)
    for stem, shape in changes.items():
        if shape is None:
            del tensors[f"blk.0.{stem}"]
        else:
            tensors[f"blk.0.{stem}"] = np.zeros(shape, np.float32)
    known: dict[str, Any] = {
        "attention_head_count": 4,
        "attention_head_count_kv": 2,
        **settings,
    }
    source = ArraySource(tensors, architecture=architecture, **known)
    (found,) = layer_geometry(source)
    return found


FUSED: Changes = {f"attn_{part}.weight": None for part in "qkv"} | {"attn_qkv.weight": (64, 48)}
REASONS: dict[str, tuple[Changes, Settings, str]] = {
    "alibi": ({}, {"attention_max_alibi_bias": 8.0}, "ALiBi"),
    "shared keys": ({}, {"attention_shared_kv_layers": 1}, "share"),
    "latent": ({"attn_kv_b.weight": (8, 8)}, {}, "MLA"),
    "ssm": ({"ssm_in.weight": (8, 8)}, {}, "recurrence"),
    "no q": ({"attn_q.weight": None}, {}, "attn_q.weight is missing"),
    "no o": ({"attn_output.weight": None}, {}, "attn_output.weight is missing"),
    "gate": ({"attn_gate.weight": (32, 48)}, {}, "attn_gate.weight"),
    "scale": ({"attn_q.scale": (1,)}, {}, "attn_q.scale"),
    "relative bias": ({"attn_rel_b.weight": (4, 32)}, {}, "attn_rel_b.weight"),
    "wide q": ({"attn_q.weight": (64, 48)}, {"attention_key_length": 8}, "attn_q.weight"),
    "narrow v": ({"attn_v.weight": (8, 48)}, {"attention_value_length": 8}, "attn_v.weight"),
    "o": ({"attn_output.weight": (48, 40)}, {}, "attn_output.weight"),
    "norm": ({"attn_q_norm.weight": (5,)}, {}, "attn_q_norm.weight"),
    "sinks": ({"attn_sinks.weight": (3,)}, {}, "attn_sinks.weight"),
    "bias": ({"attn_k.bias": (5,)}, {}, "attn_k.bias"),
    "no heads here": ({}, {"attention_head_count": [0], "attention_head_count_kv": [0]}, "no attention"),
    "three groups": ({}, {"attention_head_count_kv": 3}, "do not divide"),
    "stacked": ({"attn_q.weight": (2, 16, 48)}, {}, "attn_q.weight"),
    "fused llama": (FUSED, {}, "not known for llama"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_a_layer_that_cannot_be_aligned_says_why(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes, settings, reason = REASONS[case]
    caplog.set_level("INFO", "edgemerge")
    known: dict[str, Any] = {**settings}
    found = geometry(changes, **known)
    assert isinstance(found, Skipped)
    assert reason in found.reason
    assert found.reason in caplog.text


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("bloom", {}), ("baichuan", {"block_count": 40}), ("jina-bert-v2", {})],
)
def test_alibi_that_the_metadata_does_not_state(architecture: str, settings: Settings) -> None:
    found = geometry({}, architecture, **settings)
    assert isinstance(found, Skipped)
    assert "ALiBi" in found.reason
    assert isinstance(geometry({}, "baichuan", block_count=32), LayerHeads)


def test_head_counts_per_layer() -> None:
    wide, narrow = head_tensors(4, 2, layers=3), head_tensors(2, 2, layers=3)
    tensors = {k: x for k, x in wide.items() if "blk.1" not in k}
    tensors |= {k: x for k, x in narrow.items() if "blk.1" in k}
    del tensors["blk.2.attn_q.weight"]
    source = ArraySource(
        tensors, attention_head_count=[4, 2, 0], attention_head_count_kv=[2, 2, 0], layers=3
    )
    first, second, third = layer_geometry(source)
    assert isinstance(first, LayerHeads)
    assert isinstance(second, LayerHeads)
    assert (first.n_heads, first.n_kv_heads) == (4, 2)
    assert (second.n_heads, second.n_kv_heads) == (2, 2)
    assert isinstance(third, Skipped)


def test_norms_shared_by_all_heads_stay() -> None:
    found = geometry({"attn_q_norm.weight": (8,), "attn_k_norm.weight": (8,)})
    assert isinstance(found, LayerHeads)
    assert not any("norm" in name for name in found.axes)
    per_head = geometry({"attn_q_norm.weight": (4, 8), "attn_k_norm.weight": (16,)})
    assert isinstance(per_head, LayerHeads)
    assert per_head.axes["blk.0.attn_q_norm.weight"].axis == "rows"
    assert per_head.axes["blk.0.attn_k_norm.weight"].axis == "columns"


@pytest.mark.parametrize(("architecture", "settings"), [("phi3", {}), ("gptneox", {})])
def test_fused_parts(architecture: str, settings: Settings) -> None:
    """Rows of attn_qkv are q, k, v; a head's length is an equal part of the embedding if not stated."""
    changes: Changes = {**FUSED, "attn_qkv.bias": (64,), "attn_output.weight": (32, 32)}
    found = geometry(changes, architecture, embedding_length=32, **settings)
    assert isinstance(found, LayerHeads)
    parts = (HeadBlocks("head", 4, 8), HeadBlocks("group", 2, 8), HeadBlocks("group", 2, 8))
    assert found.axes["blk.0.attn_qkv.weight"].parts == parts
    assert found.axes["blk.0.attn_qkv.bias"].parts == parts
    assert found.axes["blk.0.attn_qkv.bias"].axis == "columns"


def test_what_moves_and_what_stays() -> None:
    vectors = {"attn_norm.weight": (48,), "attn_output.bias": (48,), "attn_sinks.weight": (4,)}
    found = geometry({**vectors, "attn_v.bias": (16,), "attn_sub_norm.weight": (32,)})
    assert isinstance(found, LayerHeads)
    moved = {name.removeprefix("blk.0.attn_"): axis.axis for name, axis in found.axes.items()}
    assert moved == {
        "q.weight": "rows",
        "k.weight": "rows",
        "v.weight": "rows",
        "output.weight": "columns",
        "v.bias": "columns",
        "sinks.weight": "columns",
        "sub_norm.weight": "columns",
    }
