"""The rotation in a configuration that is made of a GGUF."""

from __future__ import annotations

import numpy as np

from edgemerge.formats.hub.config import MAX_HEAD_DIM
from edgemerge.formats.hub.rope import LLAMA3_DEFAULTS, llama3_factors, yarn_scale
from edgemerge.formats.hub.stated import Json, Stated
from edgemerge.types import Float32

__all__ = ["FREQUENCIES", "head_length", "make_rope", "read_factors"]

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_THETA = 10000.0
MAX_ORIGINAL = 1 << 24
# Of rope type llama3, as models are published: Llama 3, and Llama 4
LLAMA3_LIMITS: tuple[dict[str, float], ...] = (
    {},
    {"low_freq_factor": 1.0, "high_freq_factor": 1.0},
)


def head_length(raw: Json) -> int:
    """Return the elements of a head, going by config.json."""
    return int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])


def make_rope(stated: Stated, raw: Json, kinds: tuple[str, ...]) -> Json:
    """Return what config.json states of the rotation, which is the same in most families.

    Parameters
    ----------
    stated : Stated
        The GGUF.
    raw : dict
        What of config.json was made so far.
    kinds : tuple of str
        Those of the rotation that the family has.

    Raises
    ------
    FormatError
        The divisors of its frequencies are none that a configuration can state.
    """
    theta = stated.get("rope.freq_base")
    found: Json = {"rope_theta": ROPE_THETA if theta is None else theta}
    values: Json = {}
    kind = stated.get("rope.scaling.type")
    if kind in ("linear", "yarn"):
        values = {"rope_type": kind, "factor": stated.get("rope.scaling.factor")}
    if kind == "yarn":
        names = {
            "original_max_position_embeddings": "original_context_length",
            "extrapolation_factor": "yarn_ext_factor",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
            "mscale_all_dim": "yarn_log_multiplier",
        }
        values |= {name: stated.get(f"rope.scaling.{key}") for name, key in names.items()}
        if values["mscale_all_dim"] is not None:
            values["mscale"] = 1.0  # what llama.cpp takes it to be
        if values["attention_factor"] is None:
            values["attention_factor"] = _attention_factor(stated, values)
        values["llama_4_scaling_beta"] = stated.get("attention.temperature_scale")
    if LONG in stated.specs and SHORT in stated.specs:
        values = {
            "rope_type": "longrope",
            "long_factor": [float(str(value)) for value in read_factors(stated, LONG)],
            "short_factor": [float(str(value)) for value in read_factors(stated, SHORT)],
            "attention_factor": stated.get("rope.scaling.attn_factor"),
        }
    if FREQUENCIES in stated.specs and "proportional" not in kinds:
        values = _llama3(stated, found["rope_theta"], head_length(raw))
    values = {name: value for name, value in values.items() if value is not None}
    return found | ({"rope_scaling": values} if values else {})


def _attention_factor(stated: Stated, values: Json) -> float | None:
    """Return what the attention's temperature is divided by, where it is not llama.cpp's own factor."""
    ratio, factor = stated.get("rope.scaling.attn_factor"), values["factor"]
    if ratio is None or factor is None:
        return None
    multiplier = values["mscale_all_dim"]
    return float(ratio * yarn_scale(factor, 1.0) / yarn_scale(factor, multiplier or 0.0))


def read_factors(stated: Stated, name: str) -> Float32:
    """Read divisors of frequencies, one for each pair of elements of a head."""
    if 2 * stated.specs[name].n_elements > MAX_HEAD_DIM:
        raise stated.refuse(f"its {name} has {stated.specs[name].n_elements} elements")
    factors = stated.read_f32(name)
    if not np.all(np.isfinite(factors)):
        raise stated.refuse(f"its {name} holds NaN or infinity")
    return factors


def _llama3(stated: Stated, theta: float, head_dim: int) -> Json:
    """Find the parameters whose divisors of frequencies the model has.

    Raises
    ------
    FormatError
        None of those that models are published with gives them.
    """
    factors = read_factors(stated, FREQUENCIES)
    if not (1 < theta <= 1e38 and 2 * factors.size == head_dim and np.all(factors >= 1)):
        raise stated.refuse(f"its {FREQUENCIES} does not fit to its other keys")
    for limits in LLAMA3_LIMITS:
        values = {**LLAMA3_DEFAULTS, "factor": float(str(factors.max())), **limits}
        original = 1
        while original <= MAX_ORIGINAL:
            found = llama3_factors(theta, head_dim, original, *values.values())
            # Others compute them in float32 throughout, which may differ in the last places.
            if found.shape == factors.shape and np.allclose(found, factors, rtol=1e-5, atol=0):
                return {
                    "rope_type": "llama3",
                    **values,
                    "original_max_position_embeddings": original,
                }
            original *= 2
    raise stated.refuse(f"its {FREQUENCIES} is not what rope type llama3 makes")
