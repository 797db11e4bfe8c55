"""Gemma 4: two lengths of heads, layers that share keys and values, embeddings of layers, and experts.

The keys are those of `Gemma4Model` in llama.cpp's conversion/gemma.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgemerge.formats.gguf.metadata import Scalar, encode_value
from edgemerge.formats.hub.checker import MAX_COUNT, Checker
from edgemerge.formats.hub.cuts import Cuts, Stored, whole
from edgemerge.formats.hub.own_keys import Shapes, stated_kinds
from edgemerge.formats.hub.reader import HEADS, LENGTHS, Reader

__all__ = ["FULL", "GEMMA4", "SLIDING", "check_sharing"]

SLIDING, FULL = "sliding_attention", "full_attention"
SHARED, EMBEDDED = "num_kv_shared_layers", "hidden_size_per_layer_input"
MAX_HEAD_DIM = 1 << 14
ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


@dataclass(frozen=True, slots=True)
class _Layers:
    """What differs from layer to layer."""

    types: list[str]  # sliding or full attention
    n_own: int  # the first layers, which have keys and values of their own
    head_dims: dict[str, int]
    n_kv_heads: dict[str, int]
    width: int
    is_wide: bool  # whether the others' feed-forward part has twice the width
    shares_keys: bool  # whether full attention takes its values from its keys

    def width_of(self, layer: int) -> int:
        return self.width * (2 if self.is_wide and layer >= self.n_own else 1)


def _read_layers(check: Checker, shapes: Shapes) -> _Layers:
    n = shapes.n_layers
    default = [SLIDING if (i + 1) % 6 and i + 1 < n else FULL for i in range(n)]
    types = stated_kinds(check, default, (SLIDING, FULL))
    if types[-1] != FULL:
        raise check.unlike("layer_types", types[-1], "full attention in the last layer")
    n_shared = check.count("num_kv_shared_layers", most=n) if check.get(SHARED) else 0
    check_sharing(check, types, n - n_shared)
    n_kv_head = check.count("num_key_value_heads")
    n_full = check.count("num_global_key_value_heads", n_kv_head)
    if shapes.n_head % n_full:
        raise check.refuse(
            "num_global_key_value_heads", n_full, f"a divisor of the {shapes.n_head} heads"
        )
    return _Layers(
        types,
        n - n_shared,
        {SLIDING: shapes.head_dim, FULL: check.count("global_head_dim", most=MAX_HEAD_DIM)},
        {SLIDING: n_kv_head, FULL: n_full},
        check.count("intermediate_size", most=MAX_COUNT // 2),  # some layers may have twice that
        check.flag("use_double_wide_mlp"),
        check.flag("attention_k_eq_v"),
    )


def check_sharing(check: Checker, types: list[str], n_own: int) -> None:
    """Refuse layers that share the keys and values of others than llama.cpp takes.

    It takes those of the last layer that has its own for full attention, and for windows those of the one
    before (`create_memory` in llama-model.cpp). transformers takes the last of the same type.
    """
    if n_own < 2:  # asserted there
        raise check.unlike(SHARED, len(types) - n_own, "two layers at least that do not share")
    if n_own < len(types) and types[max(0, n_own - 2) : n_own] != [SLIDING, FULL]:
        raise check.unlike(
            SHARED,
            len(types) - n_own,
            "a window and then full attention in the last two layers that do not share",
        )


def restate(check: Checker) -> dict[str, Any]:
    """Return what newer configurations say layer by layer, and the rotation where none is stated."""
    stated: dict[str, Any] = {}
    if check.get("rope_parameters") is None:
        stated["rope_parameters"] = ROPE
    by_layer = check.get("per_layer_config")
    if by_layer is None:
        if not check.flag("attention_k_eq_v"):
            stated["num_global_key_value_heads"] = None
        return stated
    types = check.get("layer_types")
    if not isinstance(by_layer, dict) or not isinstance(types, list):
        raise check.refuse("per_layer_config", by_layer, "an object beside a list of layer_types")
    full = [str(i) for i, kind in enumerate(types) if kind == FULL]
    tables = [by_layer.get(i) for i in full]
    alike = all(table == tables[0] for table in tables) and set(by_layer) <= set(full)
    if not tables or not alike or not isinstance(tables[0], dict):
        raise check.unlike("per_layer_config", by_layer, "all layers of full attention alike")
    if unknown := set(tables[0]) - {"head_dim", "num_key_value_heads"}:
        raise check.unlike(f"per_layer_config.{min(unknown)}", tables[0], "one for all layers")
    stated["global_head_dim"] = tables[0].get("head_dim", check.get("head_dim"))
    stated["num_global_key_value_heads"] = tables[0].get("num_key_value_heads")
    return stated


def keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State what differs from layer to layer, once for each kind of layer or for each layer."""
    if (sees := check.get("use_bidirectional_attention")) not in (None, "vision"):
        raise check.unlike("use_bidirectional_attention", sees, "causal attention of text")
    layers, n = _read_layers(check, shapes), shapes.n_layers
    full, sliding = layers.head_dims[FULL], layers.head_dims[SLIDING]
    counts = {
        **dict.fromkeys(LENGTHS, full),
        **{f"{key}_swa": sliding for key in LENGTHS},
        "rope.dimension_count": full,
        "rope.dimension_count_swa": sliding,
        "attention.sliding_window": check.count("sliding_window"),
        "attention.shared_kv_layers": n - layers.n_own,
        "embedding_length_per_layer_input": _embedded(check),
    }
    if check.flag("enable_moe_block"):
        counts["expert_count"] = check.count("num_experts")
        counts["expert_used_count"] = check.count("top_k_experts")
        counts["expert_feed_forward_length"] = check.count("moe_intermediate_size")
    slides: list[Scalar] = [kind == SLIDING for kind in layers.types]
    found = {key: encode_value(count, "u32") for key, count in counts.items()}
    found["attention.sliding_window_pattern"] = encode_value(slides, "[bool]")
    if check.get("final_logit_softcapping") is not None:
        cap = check.number("final_logit_softcapping")
        found["final_logit_softcapping"] = encode_value(cap, "f32")
    if layers.is_wide:
        widths: list[Scalar] = [layers.width_of(i) for i in range(n)]
        found["feed_forward_length"] = encode_value(widths, "[i32]")
    if check.get("num_global_key_value_heads") is not None:
        heads: list[Scalar] = [layers.n_kv_heads[kind] for kind in layers.types]
        found[HEADS[1]] = encode_value(heads, "[i32]")
    return found


def _embedded(check: Checker) -> int:
    """Return the width of the embeddings of layers; 0: there are none."""
    if not check.raw.get(EMBEDDED, check.get(EMBEDDED)):
        return 0
    rows, wanted = check.count("vocab_size_per_layer_input"), check.count("vocab_size")
    if rows != wanted:
        raise check.unlike("vocab_size_per_layer_input", rows, f"vocab_size, {wanted}")
    return check.count(EMBEDDED)


def kinds(check: Checker, shapes: Shapes) -> tuple[str, ...]:
    """Return where each layer has its keys and values from."""
    layers = _read_layers(check, shapes)
    own = {SLIDING: "own", FULL: "keys" if layers.shares_keys else "own"}
    return tuple(own[kind] if i < layers.n_own else "shared" for i, kind in enumerate(layers.types))


def variant(check: Checker, shapes: Shapes) -> str | None:
    """Return which parts the model has beside those that all have."""
    parts = "+experts" if check.flag("enable_moe_block") else ""
    parts += "+embeddings" if _embedded(check) else ""
    return f"gemma4_text{parts}" if parts else None


def cuts(check: Checker, shapes: Shapes) -> Cuts:
    """Return the tensors of a layer, whose shapes depend on its kind."""
    layers, n_embedded = _read_layers(check, shapes), _embedded(check)
    common = {**_embedded_tensors(shapes, n_embedded), **_expert_tensors(check, shapes)}
    outside = {
        "model.embed_tokens_per_layer.weight": whole(
            "per_layer_token_embd.weight",
            (check.count("vocab_size"), shapes.n_layers * n_embedded),
        ),
        "model.per_layer_model_projection.weight": whole(
            "per_layer_model_proj.weight", (shapes.n_layers * n_embedded, shapes.n_embd)
        ),
        "model.per_layer_projection_norm.weight": whole(
            "per_layer_proj_norm.weight", (n_embedded,)
        ),
    }

    def tensors(layer: int | None) -> Mapping[str, Stored]:
        if layer is None:
            return outside if n_embedded else {}
        if layer >= shapes.n_layers:
            return {}
        return common | _layer_tensors(layers, shapes, layer)

    return tensors


def _layer_tensors(layers: _Layers, shapes: Shapes, layer: int) -> dict[str, Stored]:
    kind, width, n_embd = layers.types[layer], layers.width_of(layer), shapes.n_embd
    head = layers.head_dims[kind]
    q, kv = shapes.n_head * head, layers.n_kv_heads[kind] * head
    tensors = {
        "self_attn.q_proj.weight": whole("attn_q.weight", (q, n_embd)),
        "self_attn.k_proj.weight": whole("attn_k.weight", (kv, n_embd)),
        "self_attn.v_proj.weight": whole("attn_v.weight", (kv, n_embd)),
        "self_attn.o_proj.weight": whole("attn_output.weight", (n_embd, q)),
        "self_attn.q_norm.weight": whole("attn_q_norm.weight", (head,)),
        "self_attn.k_norm.weight": whole("attn_k_norm.weight", (head,)),
        "mlp.gate_proj.weight": whole("ffn_gate.weight", (width, n_embd)),
        "mlp.up_proj.weight": whole("ffn_up.weight", (width, n_embd)),
        "mlp.down_proj.weight": whole("ffn_down.weight", (n_embd, width)),
        "layer_scalar": whole("layer_output_scale.weight", (1,)),
    }
    if layer >= layers.n_own:  # published models have them, nothing uses them
        unused = ("k_proj", "v_proj", "k_norm")
        tensors |= {f"self_attn.{name}.weight": Stored((), ()) for name in unused}
    return tensors


def _embedded_tensors(shapes: Shapes, width: int) -> dict[str, Stored]:
    n_embd = shapes.n_embd
    if not width:
        return {}
    return {
        "per_layer_input_gate.weight": whole("inp_gate.weight", (width, n_embd)),
        "per_layer_projection.weight": whole("proj.weight", (n_embd, width)),
        "post_per_layer_input_norm.weight": whole("post_norm.weight", (n_embd,)),
    }


def _expert_tensors(check: Checker, shapes: Shapes) -> dict[str, Stored]:
    if not check.flag("enable_moe_block"):
        return {}
    n, width, n_embd = (
        check.count("num_experts"),
        check.count("moe_intermediate_size"),
        shapes.n_embd,
    )
    norms = {
        f"{name}.weight": whole(f"{stem}.weight", (n_embd,))
        for name, stem in (
            ("post_feedforward_layernorm_1", "post_ffw_norm_1"),
            ("post_feedforward_layernorm_2", "post_ffw_norm_2"),
            ("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
        )
    }
    return {
        **norms,
        "router.proj.weight": whole("ffn_gate_inp.weight", (n, n_embd)),
        "router.scale": whole("ffn_gate_inp.scale", (n_embd,)),
        "router.per_expert_scale": whole("ffn_down_exps.scale", (n,)),
        "experts.gate_up_proj": whole("ffn_gate_up_exps.weight", (n, 2 * width, n_embd)),
        "experts.down_proj": whole("ffn_down_exps.weight", (n, n_embd, width)),
    }


GEMMA4: dict[str, Reader] = {
    "gemma4_text": Reader(
        ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
        (
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            *HEADS,
            "rope.freq_base",
            "rope.freq_base_swa",
            "attention.layer_norm_rms_epsilon",
            "expert_count",
            "expert_used_count",
            *LENGTHS,
            "final_logit_softcapping",
            "attention.sliding_window",
            "attention.shared_kv_layers",
            "embedding_length_per_layer_input",
            "attention.sliding_window_pattern",
            *(f"{key}_swa" for key in LENGTHS),
            "expert_feed_forward_length",
            "rope.dimension_count",
            "rope.dimension_count_swa",
        ),
        ("proportional",),
        {
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "global_head_dim": 512,
            "vocab_size": 262144,
            "vocab_size_per_layer_input": 262144,
            "hidden_size_per_layer_input": 256,
            "sliding_window": 512,
            "rope_local_base_freq": 10000.0,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        own_keys=keys,
        layer_kinds=kinds,
        cuts=cuts,
        variant=variant,
        restate=restate,
        states_head_dim=True,
    ),
}
