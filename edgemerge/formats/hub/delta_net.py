"""Qwen3-Next, Qwen3.5 and its mixtures: three layers of four have a gated delta net in place of attention.

The keys are those of `Qwen3NextModel` and its heirs in llama.cpp's conversion/qwen.py. Layers that guess
further tokens (`mtp`) are left out, as its option --no-mtp does.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgemerge.formats.gguf.metadata import Scalar, encode_value
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.cuts import Cut, Cuts, Stored, whole
from edgemerge.formats.hub.own_keys import Shapes, qwen3_moe_keys, stated_kinds
from edgemerge.formats.hub.reader import SCALING, Reader
from edgemerge.formats.hub.rope import rotated_part

__all__ = ["DELTA_NET_READERS", "FULL", "LINEAR"]

LINEAR, FULL = "linear_attention", "full_attention"
MAX_HEADS, MAX_EXPERTS = 1 << 14, 1 << 14  # lists of so many are made from them
SECTIONS = [11, 11, 10]  # of the rotation in Qwen3.5, where none are stated


def delta_net_layers(check: Checker, shapes: Shapes) -> tuple[str, ...]:
    """Return which layers have a delta net, and which attention."""
    period = check.count("full_attention_interval")
    default = [FULL if (i + 1) % period == 0 else LINEAR for i in range(shapes.n_layers)]
    return tuple(stated_kinds(check, default, (LINEAR, FULL)))


def delta_net_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State the sizes of the delta net, and which layers have it."""
    n_key, n_value, size = _head_counts(check)
    counts = {
        "ssm.conv_kernel": check.count("linear_conv_kernel_dim"),
        "ssm.state_size": size,
        "ssm.group_count": n_key,
        "ssm.time_step_rank": n_value,
        "ssm.inner_size": check.size("linear_value_head_dim", n_value * size),
        "full_attention_interval": check.count("full_attention_interval"),
    }
    recurs: list[Scalar] = [kind == LINEAR for kind in delta_net_layers(check, shapes)]
    return {
        **{key: encode_value(count, "u32") for key, count in counts.items()},
        "attention.recurrent_layers": encode_value(recurs, "[bool]"),
    }


def _head_counts(check: Checker) -> tuple[int, int, int]:
    """Return the heads of keys and of values, and the elements of each."""
    n_key = check.count("linear_num_key_heads", most=MAX_HEADS)
    n_value = check.count("linear_num_value_heads", most=MAX_HEADS)
    if n_value % n_key:
        raise check.refuse("linear_num_value_heads", n_value, f"a multiple of the {n_key} of keys")
    size = check.count("linear_value_head_dim")
    if size != (of_keys := check.count("linear_key_head_dim")):
        raise check.unlike("linear_value_head_dim", size, f"linear_key_head_dim, {of_keys}")
    return n_key, n_value, size


def qwen35_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State how the elements that turn are divided among time, height and width."""
    rope = check.raw.get("rope_scaling") or check.raw.get("rope_parameters") or {}
    stated = rope.get("mrope_section", SECTIONS)
    if not isinstance(stated, list) or not 3 <= len(stated) <= 4:
        raise check.refuse("mrope_section", stated, "a list of three numbers")
    if any(type(n) is not int or not 0 <= n <= shapes.head_dim for n in stated):
        raise check.refuse("mrope_section", stated, "a list of three numbers")
    n_pairs = int(rotated_part(check, rope) * shapes.head_dim) // 2
    _check_sections(check, stated, shapes.head_dim, n_pairs)
    sections: list[Scalar] = [*stated, 0][:4]
    dimensions = encode_value(sections, "[i32]")
    return {**delta_net_keys(check, shapes), "rope.dimension_sections": dimensions}


def _check_sections(check: Checker, sections: list[int], head_dim: int, n_pairs: int) -> None:
    """Refuse sections that end llama.cpp, or leave pairs unturned there (`ggml_mrope_cache_init`).

    transformers turns all pairs of a text by the same position, whatever the sections.
    """
    total = sum(sections)
    if not 0 < total <= head_dim:
        raise check.unlike("mrope_section", sections, f"sections of {head_dim} elements at most")
    places = [i % total for i in range(n_pairs)]
    if any(place >= 3 * sections[place % 3] for place in places):
        raise check.unlike("mrope_section", sections, f"sections that cover {n_pairs} pairs")


def qwen35_moe_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State the widths of experts too."""
    return qwen35_keys(check, shapes) | _expert_keys(check)


def qwen3_next_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """State the sizes of delta nets and experts; every layer has experts."""
    own = qwen3_moe_keys(check, shapes) | _expert_keys(check)
    return delta_net_keys(check, shapes) | own


def _expert_keys(check: Checker) -> dict[str, bytes]:
    widths = {
        "expert_feed_forward_length": check.count("moe_intermediate_size"),
        "expert_shared_feed_forward_length": check.count("shared_expert_intermediate_size"),
    }
    return {key: encode_value(width, "u32") for key, width in widths.items()}


def width_if_stated(check: Checker) -> int:
    """Return the width of a dense feed-forward part, which a mixture need not state."""
    return check.count("intermediate_size") if check.get("intermediate_size") is not None else 0


def qwen35_cuts(check: Checker, shapes: Shapes) -> Cuts:
    """Lay out a delta net whose heads of values lie in groups, one for each head of keys.

    GGUF has the first of every group, then the second of every group: `_reorder_v_heads` of llama.cpp's
    conversion/qwen.py. With two heads of keys and four of values, it has 0, 2, 1, 3.
    """
    n_key, n_value, size = _head_counts(check)
    per_group = n_value // n_key
    order = [i * per_group + j for j in range(per_group) for i in range(n_key)]
    places = [j * n_key + i for i in range(n_key) for j in range(per_group)]
    n_embd, n_heads = shapes.n_embd, 2 * n_key + n_value
    starts = [*range(2 * n_key), *(2 * n_key + head for head in order)]
    tensors = {
        **_common_tensors(check, shapes, order, starts),
        "linear_attn.in_proj_qkv.weight": _heads(
            "attn_qkv.weight", (n_heads * size, n_embd), starts, size
        ),
        "linear_attn.in_proj_z.weight": _heads(
            "attn_gate.weight", (n_value * size, n_embd), order, size
        ),
        "linear_attn.in_proj_a.weight": _heads("ssm_alpha.weight", (n_value, n_embd), order, 1),
        "linear_attn.in_proj_b.weight": _heads("ssm_beta.weight", (n_value, n_embd), order, 1),
        "linear_attn.out_proj.weight": whole("ssm_out.weight", (n_embd, n_value * size), places),
    }
    return lambda layer: tensors if layer is not None else {}


def qwen3_next_cuts(check: Checker, shapes: Shapes) -> Cuts:
    """Lay out a delta net whose stored rows are one group for each head of keys.

    A group has a query, a key, its values and their gates.
    """
    n_key, n_value, size = _head_counts(check)
    per_group = n_value // n_key
    n_embd, n_heads, n_in_group = shapes.n_embd, 2 * n_key + n_value, 2 + 2 * per_group
    groups = [i * n_in_group for i in range(n_key)]
    values = [group + 2 + j for group in groups for j in range(per_group)]
    qkv = [*groups, *(group + 1 for group in groups), *values]
    mixed = (
        *_heads("attn_qkv.weight", (n_heads * size, n_embd), qkv, size).cuts,
        *_heads(
            "attn_gate.weight",
            (n_value * size, n_embd),
            [value + per_group for value in values],
            size,
        ).cuts,
    )
    tensors = {
        **_common_tensors(check, shapes, range(n_value), range(n_heads)),
        "linear_attn.in_proj_qkvz.weight": Stored((n_key * n_in_group * size, n_embd), mixed),
        "linear_attn.in_proj_ba.weight": whole("ssm_ba.weight", (2 * n_value, n_embd)),
        "linear_attn.out_proj.weight": whole("ssm_out.weight", (n_embd, n_value * size)),
    }
    return lambda layer: tensors if layer is not None else {}


def _heads(stem: str, shape: tuple[int, ...], order: Sequence[int], height: int) -> Stored:
    """Return a tensor whose heads, of `height` rows each, GGUF has in another order."""
    starts = tuple(head * height for head in order)
    return Stored(shape, (Cut(stem, shape, starts, height),))


def _common_tensors(
    check: Checker, shapes: Shapes, values: Sequence[int], channels: Sequence[int]
) -> dict[str, Stored]:
    """Return what the families have alike, with heads of values, and all heads, in GGUF's order."""
    _, n_value, size = _head_counts(check)
    n_taps, n_channels = check.count("linear_conv_kernel_dim"), len(channels) * size
    decay = tuple(values)
    heads = tuple(head * size for head in channels)
    conv = Cut("ssm_conv1d.weight", (n_channels, n_taps), heads, size)
    q = 2 * shapes.n_head * shapes.head_dim  # each head's query, then its gate
    return {
        "self_attn.q_proj.weight": whole("attn_q.weight", (q, shapes.n_embd)),
        "linear_attn.A_log": Stored((n_value,), (Cut("ssm_a", (n_value,), decay, 1),)),
        "linear_attn.dt_bias": _heads("ssm_dt.bias", (n_value,), values, 1),
        "linear_attn.norm.weight": whole("ssm_norm.weight", (size,)),  # which alone is not less 1
        "linear_attn.conv1d.weight": Stored((n_channels, 1, n_taps), (conv,)),
        **_expert_tensors(check, shapes),
    }


def _expert_tensors(check: Checker, shapes: Shapes) -> dict[str, Stored]:
    """Return the shared expert, and the others as they are where all of a layer are stored as one."""
    if check.get("num_experts") is None:
        return {}
    n, n_embd = check.count("num_experts", most=MAX_EXPERTS), shapes.n_embd
    width, shared = (
        check.count(key) for key in ("moe_intermediate_size", "shared_expert_intermediate_size")
    )
    shape = (n, width, n_embd)
    gate_up = tuple(
        Cut(stem, shape, tuple(2 * width * i + first for i in range(n)), width)
        for stem, first in (("ffn_gate_exps.weight", 0), ("ffn_up_exps.weight", width))
    )
    return {
        "mlp.experts.gate_up_proj": Stored((n, 2 * width, n_embd), gate_up),
        "mlp.experts.down_proj": whole("ffn_down_exps.weight", (n, n_embd, width)),
        "mlp.shared_expert_gate.weight": whole("ffn_gate_inp_shexp.weight", (1, n_embd)),
        "mlp.shared_expert.gate_proj.weight": whole("ffn_gate_shexp.weight", (shared, n_embd)),
        "mlp.shared_expert.up_proj.weight": whole("ffn_up_shexp.weight", (shared, n_embd)),
        "mlp.shared_expert.down_proj.weight": whole("ffn_down_shexp.weight", (n_embd, shared)),
    }


_FIRST = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    *SCALING,
    "rope.dimension_sections",
    "rope.freq_base",
    "attention.layer_norm_rms_epsilon",
    "expert_count",
    "expert_used_count",
    "attention.key_length",
    "attention.value_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "ssm.conv_kernel",
    "ssm.state_size",
    "ssm.group_count",
    "ssm.time_step_rank",
    "ssm.inner_size",
    "attention.recurrent_layers",
    "full_attention_interval",
    "rope.dimension_count",
)
_DEFAULTS = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_MIXTURE = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
_EXPERTS = (("num_experts",), "num_experts_per_tok", "moe_intermediate_size")

DELTA_NET_READERS: dict[str, Reader] = {
    "qwen3_next": Reader(
        ("Qwen3NextForCausalLM",),
        _FIRST,
        ("default", "yarn"),
        {
            **_DEFAULTS,
            **_MIXTURE,
            "num_key_value_heads": 2,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
        own_keys=qwen3_next_keys,
        layer_kinds=delta_net_layers,
        cuts=qwen3_next_cuts,
        width=width_if_stated,
        states_head_dim=True,
        experts=_EXPERTS,
    ),
    "qwen3_5_text": Reader(
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        _FIRST,
        ("default", "yarn"),
        {**_DEFAULTS, "num_key_value_heads": 4},
        own_keys=qwen35_keys,
        layer_kinds=delta_net_layers,
        cuts=qwen35_cuts,
        states_head_dim=True,
    ),
    "qwen3_5_moe_text": Reader(
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        _FIRST,
        ("default", "yarn"),
        {
            **_DEFAULTS,
            **_MIXTURE,
            "num_key_value_heads": 2,
            "num_experts": 256,
            "num_experts_per_tok": 8,
        },
        own_keys=qwen35_moe_keys,
        layer_kinds=delta_net_layers,
        cuts=qwen35_cuts,
        width=width_if_stated,
        states_head_dim=True,
        experts=_EXPERTS,
    ),
}
