"""The rotation of queries and keys: config.json's rope parameters as GGUF's keys and tensors.

Two spellings are met: `rope_scaling` beside `rope_theta`, and since transformers 5
`rope_parameters` with everything in it, for Gemma 3 once per kind of layer. The keys are those of
`TextModel.set_gguf_parameters` and `Phi3MiniModel` in llama.cpp's conversion/base.py and phi.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.hub.checker import MAX_COUNT, Checker
from edgemerge.types import Float32

__all__ = [
    "LLAMA3_DEFAULTS",
    "Rope",
    "llama3_factors",
    "read_rope",
    "rope_metadata",
    "rope_tensors",
    "rotated_part",
    "yarn_scale",
]

YARN_KEYS: dict[str, tuple[str, ...]] = {
    "ext_factor": ("extrapolation_factor",),
    "attn_factor": ("attention_factor", "attn_factor"),
    "beta_fast": ("beta_fast",),
    "beta_slow": ("beta_slow",),
}
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
YARN_SCALES = ("mscale", "mscale_all_dim")
MOST_OF_YARN = 1e6  # what is computed of larger numbers may not fit a float32
LLAMA3_DEFAULTS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED = ("llama3", "yarn", "longrope")  # know the context length that they were trained with
LONGROPE_NAMES = ("su", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    """How one model turns queries and keys."""

    kind: str  # default, linear, llama3, yarn, longrope or proportional
    theta: float
    local_theta: float | None  # of layers with a sliding window, where they have their own
    n_rot: int  # elements of a head that are turned
    head_dim: int
    original_length: int | None  # context length before it was stretched
    context_length: int
    values: dict[str, Any]  # all parameters, checked


def read_rope(check: Checker, kinds: tuple[str, ...], head_dim: int, context_length: int) -> Rope:
    """Read and check the rotation's parameters.

    Parameters
    ----------
    check : Checker
        Of config.json.
    kinds : tuple of str
        The kinds that llama.cpp computes for this architecture.
    head_dim, context_length : int
        Elements of one head; tokens of the longest text.

    Raises
    ------
    FormatError
        The kind is another one, or a value is missing or absurd.
    """
    value = check.raw.get("rope_scaling") or check.get("rope_parameters") or {}
    if not isinstance(value, dict):
        raise check.refuse("rope_scaling", value, "an object or null")
    rope, local_theta = _by_layer_kind(check, value)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = "longrope" if kind in LONGROPE_NAMES else kind
    if kind not in kinds:
        raise FormatError(
            f"rope_scaling of type {str(kind)[:40]!r} has no equal in llama.cpp for this "
            f"architecture (only {', '.join(kinds)}); use a model without it",
            path=check.path,
        )
    original = _original_length(check, kind, rope, context_length)
    _check_values(check, kind, rope)
    theta = check.number("rope_theta", check.number("rope_theta", 10000.0), rope)
    if theta <= 1:
        raise check.refuse("rope_theta", theta, "above 1")
    n_rot = _rotated_length(check, kinds, rope, head_dim)
    if kind == "yarn" and original is not None:
        _check_yarn_range(check, rope, n_rot, original, theta)
    if kind == "longrope":
        _check_factors(check, rope, n_rot)
    return Rope(kind, theta, local_theta, n_rot, head_dim, original, context_length, rope)


def _by_layer_kind(check: Checker, value: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return the parameters of full attention, and the frequency base of sliding windows."""
    has_local = "rope_local_base_freq" in check.defaults
    if "full_attention" not in value:
        return dict(value), check.number("rope_local_base_freq") if has_local else None
    full, sliding = value["full_attention"], value.get("sliding_attention") or {}
    for name, table in (("full_attention", full), ("sliding_attention", sliding)):
        if not isinstance(table, dict):
            raise check.refuse(f"rope_parameters.{name}", table, "an object")
    kind = sliding.get("rope_type", "default")
    if kind != "default":
        raise check.unlike("rope_parameters.sliding_attention.rope_type", kind, "'default'")
    local = check.number("rope_local_base_freq") if has_local else full.get("rope_theta")
    return dict(full), check.number("rope_theta", local, table=sliding)


def _check_values(check: Checker, kind: str, rope: dict[str, Any]) -> None:
    if kind == "llama3":
        for key, default in LLAMA3_DEFAULTS.items():
            rope[key] = check.number(key, default, rope)
        if rope["low_freq_factor"] > rope["high_freq_factor"]:  # equal ones are Llama 4's
            high = rope["high_freq_factor"]
            raise check.refuse("high_freq_factor", high, "at least low_freq_factor")
    elif kind in ("linear", "yarn"):
        rope["factor"] = check.number("factor", table=rope)
    if kind == "proportional" and rope.get("factor") not in (None, 1, 1.0):
        raise check.unlike("factor", rope["factor"], "1")
    if kind == "longrope":
        for name in ("factor", "attention_factor"):
            if rope.get(name) is not None:
                check.number(name, table=rope)
    if kind == "yarn":
        for name in (*(name for names in YARN_KEYS.values() for name in names), *YARN_SCALES):
            if rope.get(name) is not None:
                check.number(name, table=rope, most=MOST_OF_YARN)
        # gpt-oss was trained so. llama.cpp rounds the limits, and runs it nevertheless.
        is_trained_so = "rope_parameters" in check.defaults
        if rope.get("truncate") is False and not is_trained_so:
            raise check.unlike("truncate", False, "true")


def _check_yarn_range(
    check: Checker, rope: dict[str, Any], n_rot: int, original: int, theta: float
) -> None:
    """Refuse what changes the frequencies that are stretched in part: llama.cpp has them fixed.

    It stores the betas, and computes with 32 and 1 (`ggml_rope_yarn_corr_dims`, which rounds).
    """

    def limits(fast: float, slow: float) -> tuple[int, int]:
        low, high = (
            n_rot * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))
            for beta in (fast, slow)
        )
        return max(0, math.floor(low)), min(n_rot - 1, math.ceil(high))

    betas = [float(rope.get(name) or default) for name, default in YARN_BETAS.items()]
    if limits(*betas) != limits(*YARN_BETAS.values()):
        raise check.unlike(" and ".join(YARN_BETAS), tuple(betas), "32 and 1")


def _original_length(
    check: Checker, kind: str, rope: dict[str, Any], context_length: int
) -> int | None:
    stated = check.get("original_max_position_embeddings")
    if kind not in STRETCHED and "original_max_position_embeddings" not in check.defaults:
        return None  # Phi-3 states it in any case
    value = stated or rope.get("original_max_position_embeddings") or context_length
    if type(value) is not int or not 2 <= value <= MAX_COUNT:
        raise check.refuse("original_max_position_embeddings", value, "an integer above 1")
    return value


def _rotated_length(
    check: Checker, kinds: tuple[str, ...], rope: dict[str, Any], head_dim: int
) -> int:
    """Count the elements of a head that are turned: all, but in some families maybe fewer."""
    part = rotated_part(check, rope)
    turns_part = (
        "longrope" in kinds or "proportional" in kinds or "partial_rotary_factor" in check.defaults
    )
    if not turns_part and part != 1:
        raise check.unlike("partial_rotary_factor", part, "1")
    n_rot = int(part * head_dim)
    if n_rot % 2 or not n_rot:
        raise check.refuse("partial_rotary_factor", part, f"an even part of {head_dim} elements")
    return n_rot


def rotated_part(check: Checker, rope: Mapping[str, Any]) -> float:
    """Return which part of a head is turned, as the rotation states it or config.json; else all."""
    key = "partial_rotary_factor"
    part = check.get(key) if rope.get(key) is None else rope[key]
    part = 1.0 if part is None else part
    if not isinstance(part, int | float) or not 0 < part <= 1:
        raise check.refuse(key, part, "above 0, and 1 at most")
    return float(part)


def _check_factors(check: Checker, rope: dict[str, Any], n_rot: int) -> None:
    """Check the divisors of LongRoPE, one for each pair of elements that is turned."""
    for key in ("long_factor", "short_factor"):
        factors = rope.get(key)
        if not isinstance(factors, list) or len(factors) != n_rot // 2:
            raise check.refuse(key, factors, f"a list of {n_rot // 2} numbers")
        for factor in factors:
            check.number(key, table={key: factor})


def rope_metadata(rope: Rope, *, has_log_multiplier: bool = False) -> dict[str, bytes]:
    """Return the encoded `rope.*` keys without the architecture's name, in no certain order.

    Parameters
    ----------
    rope : Rope
        What config.json says.
    has_log_multiplier : bool
        Whether llama.cpp reads `yarn_log_multiplier` for this architecture.
    """
    keys = {"rope.freq_base": encode_value(rope.theta, "f32")}
    keys["rope.dimension_count"] = encode_value(rope.n_rot, "u32")
    if rope.local_theta is not None:
        keys["rope.freq_base_swa"] = encode_value(rope.local_theta, "f32")
    if rope.kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = encode_value(rope.kind, "str")
        keys["rope.scaling.factor"] = encode_value(float(rope.values["factor"]), "f32")
    if rope.original_length is not None and rope.kind != "llama3":
        key = "rope.scaling.original_context_length"
        keys[key] = encode_value(rope.original_length, "u32")
    if rope.kind == "yarn":
        for key, names in YARN_KEYS.items():
            value = next((rope.values[n] for n in names if rope.values.get(n) is not None), None)
            if value is not None:
                keys[f"rope.scaling.yarn_{key}"] = encode_value(float(value), "f32")
        # llama.cpp computes a factor of its own, whatever yarn_attn_factor says.
        own = yarn_scale(rope.values["factor"], 1.0)
        if has_log_multiplier and (multiplier := rope.values.get("mscale_all_dim")):
            keys["rope.scaling.yarn_log_multiplier"] = encode_value(float(multiplier), "f32")
            own /= yarn_scale(rope.values["factor"], multiplier)
        ratio = _yarn_attention(rope.values) / own
        if not math.isclose(ratio, 1.0, rel_tol=1e-6):
            keys["rope.scaling.attn_factor"] = encode_value(ratio, "f32")
    if rope.kind == "longrope":
        keys["rope.scaling.attn_factor"] = encode_value(_longrope_attention(rope), "f32")
    return keys


def _yarn_attention(values: dict[str, Any]) -> float:
    """Factor of the attention's temperature, as transformers computes it for YaRN."""
    if (stated := values.get("attention_factor")) is not None:
        return float(stated)
    if values.get("mscale") and values.get("mscale_all_dim"):
        of_all = yarn_scale(values["factor"], values["mscale_all_dim"])
        return yarn_scale(values["factor"], values["mscale"]) / of_all
    return yarn_scale(values["factor"], 1.0)


def yarn_scale(factor: float, mscale: float) -> float:
    """Peng et al. 2023, "YaRN", equation 22; `get_mscale` in llama.cpp's src/llama-context.cpp."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_attention(rope: Rope) -> float:
    """Factor of the attention's temperature: Ding et al. 2024, "LongRoPE", as transformers has it."""
    if (stated := rope.values.get("attention_factor")) is not None:
        return float(stated)
    assert rope.original_length is not None
    scale = float(rope.values.get("factor") or rope.context_length / rope.original_length)
    if scale <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(scale) / math.log(rope.original_length))


def rope_tensors(rope: Rope) -> dict[str, Float32]:
    """Return the tensors that hold divisors of frequencies, (n_rot / 2,) float32, by GGUF name."""
    if rope.kind == "llama3":
        assert rope.original_length is not None
        values = (rope.values[key] for key in LLAMA3_DEFAULTS)
        factors = llama3_factors(rope.theta, rope.n_rot, rope.original_length, *values)
        return {"rope_freqs.weight": factors}
    if rope.kind == "proportional":  # pairs that do not turn: `Gemma4Model.generate_extra_tensors`
        factors = np.full(rope.head_dim // 2, 1e30, np.float32)
        factors[: rope.n_rot // 2] = 1.0
        return {"rope_freqs.weight": factors}
    if rope.kind == "longrope":
        return {
            f"rope_factors_{which}.weight": np.array(rope.values[f"{which}_factor"], np.float32)
            for which in ("long", "short")
        }
    return {}


def llama3_factors(
    theta: float, n_rot: int, original: int, factor: float, low: float, high: float
) -> Float32:
    """Compute the divisors of rope type llama3, (n_rot / 2,).

    As `LlamaModel.generate_extra_tensors` computes them: in float32, step by step. Its power is
    torch's, ours a rounded float64, so that the bytes do not depend on a vector library.

    Parameters
    ----------
    theta : float
        Base of the frequencies.
    n_rot, original : int
        Elements of a head that are turned; context length before it was stretched.
    factor, low, high : float
        As `LLAMA3_DEFAULTS` names them.
    """
    f32 = np.float32
    factors = np.empty(n_rot // 2, np.float32)
    for i in range(len(factors)):
        exponent = f32(2 * i) / f32(n_rot)
        freq = f32(1.0) / f32(math.pow(theta, float(exponent)))
        wavelength = f32(2 * math.pi) / freq
        if wavelength < original / high:
            factors[i] = 1.0
        elif (
            wavelength > original / low or low == high
        ):  # equal ones, as in Llama 4, have no middle
            factors[i] = factor
        else:
            smooth = (f32(original) / wavelength - f32(low)) / f32(high - low)
            factors[i] = f32(1.0) / ((f32(1.0) - smooth) / f32(factor) + smooth)
    return factors
