"""Keys that one family of models alone has, and the arithmetic that llama.cpp has in one way only.

The keys are those of llama.cpp's conversion/*.py; what it does not compute is refused by its key's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgemerge.formats.gguf.metadata import Scalar, encode_value
from edgemerge.formats.hub.checker import Checker

__all__ = [
    "SIZE_OF_27B",
    "Shapes",
    "check_layer_types",
    "gemma2_keys",
    "gemma3_keys",
    "lfm2_keys",
    "lfm2_layers",
    "lfm2_width",
    "ministral3_keys",
    "no_keys",
    "olmo3_keys",
    "one_kind",
    "phi3_keys",
    "qwen3_moe_keys",
    "smollm3_keys",
    "stated_kinds",
    "stated_width",
    "windows",
]


SIZE_OF_27B = {"gemma2": 46, "gemma3_text": 62}  # layers


@dataclass(frozen=True, slots=True)
class Shapes:
    """The counts that every model has."""

    n_layers: int
    n_embd: int
    n_head: int
    head_dim: int


def no_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """Return nothing, for a family without keys of its own."""
    return {}


def one_kind(check: Checker, shapes: Shapes) -> tuple[str, ...]:
    """Return nothing, as all layers have the same tensors."""
    return ()


def stated_width(check: Checker) -> int:
    """Return the width of the feed-forward part as config.json has it."""
    return check.count("intermediate_size")


def lfm2_layers(check: Checker, shapes: Shapes) -> tuple[str, ...]:
    """Return which layers have attention, and which a short convolution."""
    indices = check.get("full_attn_idxs")
    layers = range(shapes.n_layers)
    full = {i for i in indices if type(i) is int} if isinstance(indices, list) else layers
    default = ["full_attention" if i in full else "conv" for i in layers]
    return tuple(stated_kinds(check, default, ("full_attention", "conv")))


def stated_kinds(check: Checker, default: list[str], known: tuple[str, ...]) -> list[str]:
    """Return the kind of each layer, or the default where none is stated."""
    kinds = check.get("layer_types")
    kinds = default if kinds is None else kinds
    n = len(default)
    if not isinstance(kinds, list) or len(kinds) != n or any(kind not in known for kind in kinds):
        raise check.refuse("layer_types", kinds, f"a list of {n} of {', '.join(known)}")
    return kinds


def lfm2_width(check: Checker) -> int:
    """Return the width of the feed-forward part, as `Lfm2MLP` of transformers computes it."""
    width = check.count("block_ff_dim", check.get("intermediate_size"))
    if not check.flag("block_auto_adjust_ff_dim"):
        return width
    width = int(check.number("block_ffn_dim_multiplier") * int(2 * width / 3))
    width = check.size("block_ffn_dim_multiplier", width)
    multiple = check.count("block_multiple_of")
    return check.size("block_multiple_of", multiple * -(-width // multiple))


def lfm2_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State the heads of each layer: those with a convolution have none."""
    if check.flag("conv_bias"):
        raise check.unlike("conv_bias", True, "none")
    n_kv_head = check.count("num_key_value_heads")
    kinds = lfm2_layers(check, shapes)
    heads: list[Scalar] = [n_kv_head if kind != "conv" else 0 for kind in kinds]
    return {
        "attention.head_count_kv": encode_value(heads, "[i32]"),
        "shortconv.l_cache": encode_value(check.count("conv_L_cache"), "u32"),
    }


def gemma2_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State caps of logits, and a window in every second layer."""
    _check_query_scale(check, shapes, SIZE_OF_27B["gemma2"])
    check_layer_types(check, windows(shapes.n_layers, 2))
    return {
        "attn_logit_softcapping": encode_value(check.number("attn_logit_softcapping"), "f32"),
        "final_logit_softcapping": encode_value(check.number("final_logit_softcapping"), "f32"),
        "attention.sliding_window": encode_value(check.count("sliding_window"), "u32"),
    }


def gemma3_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State a window in five layers of six, or in none."""
    _check_query_scale(check, shapes, SIZE_OF_27B["gemma3_text"])
    if check.flag("use_bidirectional_attention"):
        raise check.unlike("use_bidirectional_attention", True, "causal attention")
    if (cap := check.get("attn_logit_softcapping")) is not None:
        raise check.unlike("attn_logit_softcapping", cap, "none")
    keys = {}
    if check.get("final_logit_softcapping") is not None:
        cap = check.number("final_logit_softcapping")
        keys["final_logit_softcapping"] = encode_value(cap, "f32")
    types = check.get("layer_types")
    period = check.get("sliding_window_pattern") or check.get("_sliding_window_pattern")
    full = windows(shapes.n_layers, 1)
    if types == full or (types is None and period == 1):
        return keys
    if types is None and period not in (None, 6):
        raise check.unlike("sliding_window_pattern", period, "6 or 1")
    check_layer_types(check, windows(shapes.n_layers, 6))
    window = encode_value(check.count("sliding_window"), "u32")
    return keys | {"attention.sliding_window": window}


def windows(n_layers: int, period: int) -> list[str]:
    """Return kinds of attention where every layer of number `period` sees the whole text."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n_layers)]


def check_layer_types(check: Checker, wanted: list[str]) -> None:
    """Refuse layers of other kinds than llama.cpp has by number."""
    if check.get("layer_types") not in (None, wanted):
        period = [*wanted, "full_attention"].index("full_attention") + 1
        raise check.unlike(
            "layer_types", check.get("layer_types"), f"full attention in every layer {period}"
        )


def _check_query_scale(check: Checker, shapes: Shapes, n_layers_of_27b: int) -> None:
    """llama.cpp knows the scale of Gemma's queries by the model's size."""
    is_27b = shapes.n_layers == n_layers_of_27b
    wanted = shapes.n_embd // shapes.n_head if is_27b else shapes.head_dim
    scalar = check.number("query_pre_attn_scalar")
    if scalar != wanted:
        raise check.unlike("query_pre_attn_scalar", scalar, str(wanted))


def ministral3_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """Longer texts sharpen the attention, from the length on that YaRN stretches."""
    rope = check.raw.get("rope_scaling") or check.raw.get("rope_parameters") or {}
    if rope.get("llama_4_scaling_beta") is None:
        return {}
    if (kind := rope.get("rope_type", rope.get("type"))) != "yarn":
        raise check.unlike("rope_type", kind, "'yarn' where llama_4_scaling_beta is stated")
    beta = check.number("llama_4_scaling_beta", table=rope)
    return {"attention.temperature_scale": encode_value(beta, "f32")}


def olmo3_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State a window in any of the layers, which turn by the same frequencies without YaRN."""
    kinds = stated_kinds(
        check, windows(shapes.n_layers, 4), ("sliding_attention", "full_attention")
    )
    slides: list[Scalar] = [kind == "sliding_attention" for kind in kinds]
    keys = {
        "attention.sliding_window": encode_value(check.count("sliding_window"), "u32"),
        "attention.sliding_window_pattern": encode_value(slides, "[bool]"),
    }
    rope = check.raw.get("rope_scaling") or check.raw.get("rope_parameters") or {}
    if "full_attention" not in rope:  # then both kinds of layers have one frequency base
        theta = check.number("rope_theta", check.number("rope_theta"), rope)
        keys["rope.freq_base_swa"] = encode_value(theta, "f32")
    return keys


def phi3_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State a window, which llama.cpp does not compute with."""
    # llama.cpp computes Phi-3 without a window; 0 tells it that there is none.
    window = check.get("sliding_window")
    stated = check.count("sliding_window") if window else 0
    return {"attention.sliding_window": encode_value(stated, "u32")}


def qwen3_moe_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State the width of an expert; every layer has experts."""
    if not check.flag("norm_topk_prob"):
        raise check.unlike("norm_topk_prob", False, "true")
    if (step := check.count("decoder_sparse_step")) != 1:
        raise check.unlike("decoder_sparse_step", step, "experts in every layer")
    if layers := check.get("mlp_only_layers"):
        raise check.unlike("mlp_only_layers", layers, "experts in every layer")
    width = check.count("moe_intermediate_size")
    return {"expert_feed_forward_length": encode_value(width, "u32")}


def smollm3_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """llama.cpp leaves out the rotation in every fourth layer, whatever the model says."""
    wanted = [int((i + 1) % 4 != 0) for i in range(shapes.n_layers)]
    period = check.count("no_rope_layer_interval")
    turned = check.get("no_rope_layers")
    if turned is None:
        turned = [int((i + 1) % period != 0) for i in range(shapes.n_layers)]
    if turned != wanted:
        raise check.unlike("no_rope_layers", turned, "every fourth layer without rotation")
    return {}
