"""Falcon-H1: attention and Mamba-2 side by side in every layer, with factors between them.

llama.cpp has no keys for the factors. Weights are multiplied by them instead, as `FalconH1Model` does in
llama.cpp's conversion/falcon_h1.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgemerge.formats.hub.changes import Bands
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.mamba import StateSpace, expanded_width, read_state_space
from edgemerge.formats.hub.own_keys import Shapes
from edgemerge.formats.hub.reader import HEADS, LENGTHS, OwnShapes, Reader

__all__ = ["FALCONS", "SCALED"]

ALL = (1 << 63) - 1  # rows
# GGUF names without `blk.N.` of what may have factors
SCALED = frozenset(
    {
        "token_embd.weight",
        "output.weight",
        "attn_q.weight",
        "attn_k.weight",
        "attn_v.weight",
        "attn_output.weight",
        "ffn_gate.weight",
        "ffn_down.weight",
        "ssm_in.weight",
        "ssm_out.weight",
    }
)


def _state_space(check: Checker, shapes: Shapes) -> StateSpace:
    if check.get("mamba_d_ssm") is None:
        return read_state_space(check, expanded_width(check, shapes.n_embd))
    return read_state_space(check, check.count("mamba_d_ssm"))


def _keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    if check.flag("projectors_bias"):
        raise check.unlike("projectors_bias", True, "none")
    if check.flag("mamba_rms_norm") and check.get("mamba_norm_before_gate") is not False:
        raise check.unlike("mamba_norm_before_gate", True, "false")
    return _state_space(check, shapes).keys()


def _shapes(check: Checker, shapes: Shapes) -> OwnShapes:
    norm = OwnShapes(stored={"ffn_norm": (shapes.n_embd,)})
    return _state_space(check, shapes).shapes(shapes.n_embd) | norm


def _variant(check: Checker, shapes: Shapes) -> str | None:
    return "falcon_h1+norm" if check.flag("mamba_rms_norm") else None


def _scales(check: Checker, shapes: Shapes) -> Mapping[str, Bands]:
    """Return the factors of each tensor's rows; none where all of them are 1."""
    into, out = check.number("attention_in_multiplier"), check.number("attention_out_multiplier")
    gate, down = _numbers(check, "mlp_multipliers", 2)
    factors = {
        "token_embd.weight": (check.number("embedding_multiplier"),),
        "output.weight": (check.number("lm_head_multiplier"),),
        "attn_q.weight": (into,),
        "attn_k.weight": (check.number("key_multiplier"), into),
        "attn_v.weight": (into,),
        "attn_output.weight": (out,),
        "ffn_gate.weight": (gate,),
        "ffn_down.weight": (down,),
        "ssm_out.weight": (check.number("ssm_out_multiplier"),),
    }
    scales: dict[str, Bands] = {stem: ((ALL, numbers),) for stem, numbers in factors.items()}
    scales["ssm_in.weight"] = _in_projection(check, shapes)
    assert scales.keys() == SCALED
    return {
        stem: bands
        for stem, bands in scales.items()
        if any(factor != 1.0 for _, numbers in bands for factor in numbers)
    }


def _in_projection(check: Checker, shapes: Shapes) -> Bands:
    """Return the factors of z, x, B, C and the time step, which one matrix makes."""
    space, into = _state_space(check, shapes), check.number("ssm_in_multiplier")
    group = space.n_groups * space.n_state
    heights = (space.n_inner, space.n_inner, group, group, space.n_heads)
    bands, end = [], 0
    for height, factor in zip(heights, _numbers(check, "ssm_multipliers", 5), strict=True):
        end += height
        bands.append((end, (into, factor)))
    return tuple(bands)


def _numbers(check: Checker, key: str, n: int) -> tuple[float, ...]:
    values = check.get(key)
    if values is None:
        return (1.0,) * n
    if not isinstance(values, list) or len(values) != n:
        raise check.refuse(key, values, f"a list of {n} numbers")
    return tuple(check.number(key, table={key: value}) for value in values)


FALCONS: dict[str, Reader] = {
    "falcon_h1": Reader(
        ("FalconH1ForCausalLM",),
        (
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "block_count",
            "ssm.conv_kernel",
            "ssm.inner_size",
            "ssm.state_size",
            "ssm.time_step_rank",
            "ssm.group_count",
            "attention.layer_norm_rms_epsilon",
            "vocab_size",
            HEADS[1],
            *LENGTHS,
            "rope.freq_base",
        ),
        ("default",),
        {
            "max_position_embeddings": 8192,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "mamba_d_state": 256,
            "mamba_n_heads": 128,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            **dict.fromkeys(
                (
                    "embedding_multiplier",
                    "lm_head_multiplier",
                    "key_multiplier",
                    "attention_in_multiplier",
                    "attention_out_multiplier",
                    "ssm_in_multiplier",
                    "ssm_out_multiplier",
                ),
                1.0,
            ),
        },
        own_keys=_keys,
        own_shapes=_shapes,
        scales=_scales,
        variant=_variant,
        states_head_dim=True,
    )
}
