"""Granite 3 and 4: dense, mixtures of experts, hybrids with Mamba-2, and all of these at once.

The keys are those of llama.cpp's conversion/granite.py.
"""

from __future__ import annotations

from edgemerge.formats.gguf.metadata import Scalar, encode_value
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.mamba import StateSpace, expanded_width, read_state_space
from edgemerge.formats.hub.own_keys import Shapes
from edgemerge.formats.hub.reader import LINEAR_YARN, TEXT, OwnShapes, Reader

__all__ = ["GRANITES", "GRANITE_SCALES"]

# GGUF's key without the architecture's name -> config.json's
GRANITE_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}

KINDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
}
HYBRID_CONTEXT = 1 << 20  # what the converter states where nothing is rotated


def _scales(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State four factors, of which llama.cpp takes each for 1 where it is not stated."""
    return {
        key: encode_value(check.number(name, 1.0), "f32") for key, name in GRANITE_SCALES.items()
    }


def _shared_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    width = check.count("shared_intermediate_size")
    shared = {"expert_shared_feed_forward_length": encode_value(width, "u32")}
    return _scales(check, shapes) | shared


def _expert_shapes(check: Checker, shapes: Shapes) -> OwnShapes:
    """Return the shapes of a mixture, whose experts are stored in one tensor."""
    n, n_embd, width = (
        check.count("num_local_experts"),
        shapes.n_embd,
        check.count("intermediate_size"),
    )
    return OwnShapes(
        stored={
            "ffn_gate_inp.weight": (n, n_embd),
            "ffn_gate_exps.weight": (n, width, n_embd),
            "ffn_up_exps.weight": (n, width, n_embd),
            "ffn_down_exps.weight": (n, n_embd, width),
        }
    )


def _shared_shapes(check: Checker, shapes: Shapes) -> OwnShapes:
    """Return the shapes of a mixture with an expert that all tokens go through."""
    width, n_embd = check.count("shared_intermediate_size"), shapes.n_embd
    shared = {
        "ffn_gate_shexp.weight": (width, n_embd),
        "ffn_up_shexp.weight": (width, n_embd),
        "ffn_down_shexp.weight": (n_embd, width),
    }
    return _expert_shapes(check, shapes) | OwnShapes(stored=shared)


# -- Granite 4 ------------------------------------------------------------------------------------


def _layers(check: Checker, shapes: Shapes) -> tuple[str, ...]:
    """Return which layers have attention, and which a state space: all, where nothing is stated."""
    kinds = check.get("layer_types")
    if kinds is None:
        return ("mamba",) * shapes.n_layers
    if not isinstance(kinds, list) or any(str(kind) not in KINDS for kind in kinds):
        raise check.refuse("layer_types", kinds, f"a list of {', '.join(KINDS)}")
    if len(kinds) != shapes.n_layers:
        raise check.refuse("layer_types", kinds, f"a list of {shapes.n_layers}")
    return tuple(KINDS[kind] for kind in kinds)


def _has_experts(check: Checker) -> bool:
    return bool(check.get("num_local_experts"))


def _variant(check: Checker, shapes: Shapes) -> str | None:
    is_hybrid = "mamba" in _layers(check, shapes)
    name = f"granitemoehybrid{'+mamba' * is_hybrid}{'+experts' * _has_experts(check)}"
    return None if name == "granitemoehybrid" else name


def _state_space(check: Checker, shapes: Shapes) -> StateSpace:
    if (expand := check.count("mamba_expand")) != 2:
        raise check.unlike("mamba_expand", expand, "2")
    return read_state_space(check, expanded_width(check, shapes.n_embd))


def _own_shapes(check: Checker, shapes: Shapes) -> OwnShapes:
    own = _shared_shapes(check, shapes) if _has_experts(check) else OwnShapes()
    if "mamba" in _layers(check, shapes):
        own = own | _state_space(check, shapes).shapes(shapes.n_embd)
    return own


def _granite4_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    kinds, is_mixture = _layers(check, shapes), _has_experts(check)
    is_hybrid, is_rotated = "mamba" in kinds, check.get("position_embedding_type") == "rope"
    if not is_rotated and not is_hybrid and is_mixture:
        kind = check.get("position_embedding_type")
        raise check.unlike("position_embedding_type", kind, "'rope'")
    width = check.count("shared_intermediate_size")
    if not is_mixture and width != check.count("intermediate_size"):
        raise check.unlike("shared_intermediate_size", width, "that of intermediate_size")
    n_kv_head = check.count("num_key_value_heads", shapes.n_head)
    heads: list[Scalar] = [n_kv_head if kind == "attention" else 0 for kind in kinds]
    counts = {
        "expert_count": check.count("num_local_experts") if is_mixture else 0,
        "expert_used_count": check.count("num_experts_per_tok") if is_mixture else 0,
    }
    keys = {
        **_shared_keys(check, shapes),
        **{key: encode_value(value, "u32") for key, value in counts.items()},
        **(_state_space(check, shapes) if is_hybrid else _unused_space(check, shapes)).keys(),
        "attention.head_count_kv": encode_value(heads, "[i32]"),
        "rope.scaling.finetuned": encode_value(is_rotated, "bool"),
    }
    if is_hybrid and not is_rotated:
        keys["context_length"] = encode_value(HYBRID_CONTEXT, "u32")
    return keys


def _unused_space(check: Checker, shapes: Shapes) -> StateSpace:
    """Return the sizes of what no layer has, which are stated nevertheless."""
    return StateSpace(
        n_inner=expanded_width(check, shapes.n_embd),
        n_heads=check.count("mamba_n_heads"),
        n_groups=check.count("mamba_n_groups"),
        n_state=check.count("mamba_d_state"),
        n_taps=check.count("mamba_d_conv"),
    )


_GRANITE = (
    *TEXT,
    "vocab_size",
    "rope.dimension_count",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
_SHARED = (*_GRANITE, "expert_shared_feed_forward_length")
_MIXTURE = {
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_EXPERTS = (("num_local_experts",), "num_experts_per_tok", "intermediate_size")

GRANITES: dict[str, Reader] = {
    "granite": Reader(
        ("GraniteForCausalLM",),
        _GRANITE,
        LINEAR_YARN,
        {"max_position_embeddings": 2048},
        own_keys=_scales,
        splits_embedding=True,
    ),
    "granitemoe": Reader(
        ("GraniteMoeForCausalLM",),
        _GRANITE,
        LINEAR_YARN,
        _MIXTURE,
        own_keys=_scales,
        own_shapes=_expert_shapes,
        splits_embedding=True,
        experts=_EXPERTS,
    ),
    "granitemoeshared": Reader(
        ("GraniteMoeSharedForCausalLM",),
        _SHARED,
        LINEAR_YARN,
        _MIXTURE,
        own_keys=_shared_keys,
        own_shapes=_shared_shapes,
        splits_embedding=True,
        experts=_EXPERTS,
    ),
    "granitemoehybrid": Reader(
        ("GraniteMoeHybridForCausalLM",),
        (
            *_SHARED,
            "ssm.conv_kernel",
            "ssm.state_size",
            "ssm.group_count",
            "ssm.inner_size",
            "ssm.time_step_rank",
            "rope.scaling.finetuned",
        ),
        LINEAR_YARN,
        {
            **_MIXTURE,
            "shared_intermediate_size": 1024,
            "mamba_d_conv": 4,
            "mamba_d_state": 256,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_n_heads": 128,
        },
        own_keys=_granite4_keys,
        own_shapes=_own_shapes,
        layer_kinds=_layers,
        variant=_variant,
        splits_embedding=True,
    ),
}
