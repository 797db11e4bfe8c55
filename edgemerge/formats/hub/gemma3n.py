"""Gemma 3n: alternating updates, residuals of low rank, and layers that share keys and values.

The keys are those of `Gemma3NModel` in llama.cpp's conversion/gemma.py. llama.cpp computes one shape of
such models: it knows many of their numbers by itself (llama-hparams.h, models/gemma3n.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from edgemerge.formats.gguf.metadata import Scalar, encode_value
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.cuts import Cut, Cuts, Stored, stacked, whole
from edgemerge.formats.hub.gemma4 import FULL, SLIDING, check_sharing
from edgemerge.formats.hub.own_keys import Shapes, stated_kinds
from edgemerge.formats.hub.reader import HEADS, LENGTHS, Reader

__all__ = ["FIXED", "GEMMA3N", "SPARSE", "sparsities"]

# What llama.cpp takes for granted
N_ALTUP, WIDTH_PER_LAYER, RANK, CAP = 4, 256, 64, 30.0
FIXED = {
    "altup_num_inputs": N_ALTUP,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "hidden_size_per_layer_input": WIDTH_PER_LAYER,
    "laurel_rank": RANK,
    "final_logit_softcapping": CAP,
}
N_OWN = 20  # layers with keys and values of their own
N_SPARSE, SPARSITY = 10, 0.95  # the first layers, and how much of their feed-forward part rests
QUANTILES = {SPARSITY: NormalDist().inv_cdf(SPARSITY), 0.0: float("-inf")}
WIDTH, SPARSE = "intermediate_size", "activation_sparsity_pattern"


def restate(check: Checker) -> dict[str, Any]:
    """Return the one width of feed-forward parts, which is stated once for each layer."""
    widths = check.get(WIDTH)
    if not isinstance(widths, list):
        return {}
    if not widths or any(width != widths[0] for width in widths):
        raise check.unlike(WIDTH, widths, "one width in all layers")
    return {WIDTH: widths[0]}


def keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State what llama.cpp reads, and check what it does not."""
    n, n_shared = shapes.n_layers, _count_shared(check, shapes)
    for key, value in FIXED.items():
        if check.get(key) != value:
            raise check.unlike(key, check.get(key), str(value))
    default = [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(n)]
    types = stated_kinds(check, default, (SLIDING, FULL))
    check_sharing(check, types, n - n_shared)
    wanted = sparsities(n)
    if check.get(SPARSE) not in (None, wanted):
        raise check.unlike(SPARSE, check.get(SPARSE), f"{SPARSITY} in the first {N_SPARSE} layers")
    counts = {
        "altup.active_idx": 0,
        "altup.num_inputs": N_ALTUP,
        "embedding_length_per_layer_input": WIDTH_PER_LAYER,
        "attention.shared_kv_layers": n_shared,
        "attention.sliding_window": check.count("sliding_window"),
    }
    slides: list[Scalar] = [kind == SLIDING for kind in types]
    scales: list[Scalar] = [QUANTILES[part] for part in wanted]
    widths: list[Scalar] = [check.count(WIDTH)] * n
    return {
        **{key: encode_value(count, "u32") for key, count in counts.items()},
        "feed_forward_length": encode_value(widths, "[i32]"),
        "final_logit_softcapping": encode_value(CAP, "f32"),
        "activation_sparsity_scale": encode_value(scales, "[f32]"),
        "attention.sliding_window_pattern": encode_value(slides, "[bool]"),
    }


def sparsities(n_layers: int) -> list[float]:
    """Return how much of each layer's feed-forward part rests."""
    return [SPARSITY] * N_SPARSE + [0.0] * (n_layers - N_SPARSE)


def _count_shared(check: Checker, shapes: Shapes) -> int:
    """Count the layers that take their keys and values from others."""
    n = shapes.n_layers
    shared = check.raw.get("num_kv_shared_layers", check.get("num_kv_shared_layers"))
    if type(shared) is not int or n - shared != N_OWN or shared < 0:
        raise check.unlike("num_kv_shared_layers", shared, f"{n - N_OWN}, {N_OWN} layers less")
    return shared


def cuts(check: Checker, shapes: Shapes) -> Cuts:
    """Return the tensors of alternating updates and embeddings of layers."""
    n, n_embd = shapes.n_layers, shapes.n_embd
    kv = check.count("num_key_value_heads") * shapes.head_dim
    n_rows, n_tokens = check.count("vocab_size_per_layer_input"), check.count("vocab_size")
    if n_rows > n_tokens:
        raise check.unlike("vocab_size_per_layer_input", n_rows, f"vocab_size, {n_tokens}, at most")
    per_layer = (n_tokens, n * WIDTH_PER_LAYER)
    rows = Cut("per_layer_token_embd.weight", per_layer, (0,), n_rows)
    outside = {
        "model.embed_tokens_per_layer.weight": Stored((n_rows, per_layer[1]), (rows,)),
        "model.per_layer_model_projection.weight": whole(
            "per_layer_model_proj.weight", (per_layer[1], n_embd)
        ),
        "model.per_layer_projection_norm.weight": whole(
            "per_layer_proj_norm.weight", (WIDTH_PER_LAYER,)
        ),
    }
    for name, stem in (("projections", "proj"), ("unembed_projections", "unembd_proj")):
        for i in range(N_ALTUP - 1):
            outside[f"model.altup_{name}.{i}.weight"] = stacked(
                f"altup_{stem}.weight", (n_embd, n_embd), i, N_ALTUP - 1
            )
    inside = {
        "altup.correct_output_scale": whole("altup_correct_scale.weight", (n_embd,)),
        "altup.correction_coefs.weight": whole("altup_correct_coef.weight", (N_ALTUP, N_ALTUP)),
        "altup.prediction_coefs.weight": whole(
            "altup_predict_coef.weight", (N_ALTUP * N_ALTUP, N_ALTUP)
        ),
        "altup.modality_router.weight": whole("altup_router.weight", (N_ALTUP, n_embd)),
        "altup.router_norm.weight": whole("altup_router_norm.weight", (n_embd,)),
        "laurel.linear_left.weight": whole("laurel_l.weight", (RANK, n_embd)),
        "laurel.linear_right.weight": whole("laurel_r.weight", (n_embd, RANK)),
        "laurel.post_laurel_norm.weight": whole("laurel_post_norm.weight", (n_embd,)),
        "per_layer_input_gate.weight": whole("inp_gate.weight", (WIDTH_PER_LAYER, n_embd)),
        "per_layer_projection.weight": whole("proj.weight", (n_embd, WIDTH_PER_LAYER)),
        "post_per_layer_input_norm.weight": whole("post_norm.weight", (n_embd,)),
    }
    # llama.cpp wants them in every layer, and uses them where they are not shared.
    unused = {
        "self_attn.k_proj.weight": whole("attn_k.weight", (kv, n_embd), may_lack=True),
        "self_attn.v_proj.weight": whole("attn_v.weight", (kv, n_embd), may_lack=True),
        "self_attn.k_norm.weight": whole("attn_k_norm.weight", (shapes.head_dim,), may_lack=True),
    }

    def tensors(layer: int | None) -> Mapping[str, Stored]:
        if layer is None:
            return outside
        return inside | unused if layer >= N_OWN else inside

    return tensors


GEMMA3N: dict[str, Reader] = {
    "gemma3n_text": Reader(
        ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
        (
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            *HEADS,
            "rope.freq_base",
            "rope.freq_base_swa",
            "attention.layer_norm_rms_epsilon",
            *LENGTHS,
            "final_logit_softcapping",
            "attention.sliding_window",
            "altup.active_idx",
            "altup.num_inputs",
            "embedding_length_per_layer_input",
            "attention.shared_kv_layers",
            "activation_sparsity_scale",
            "attention.sliding_window_pattern",
        ),
        ("default",),
        {
            **FIXED,
            "max_position_embeddings": 32768,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 15,
            "head_dim": 256,
            "intermediate_size": 16384,
            "vocab_size": 262400,
            "vocab_size_per_layer_input": 262144,
            "sliding_window": 512,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        own_keys=keys,
        cuts=cuts,
        restate=restate,
        states_head_dim=True,
    ),
}
