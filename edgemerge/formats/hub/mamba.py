"""The state space of a hybrid's layers, Mamba-2: its keys, and the shapes of its tensors.

The shapes in GGUF are those of `Mamba2Model.modify_tensors` in llama.cpp's conversion/mamba.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.hub.checker import MAX_COUNT, Checker
from edgemerge.formats.hub.reader import OwnShapes

__all__ = ["StateSpace", "expanded_width", "read_state_space"]


@dataclass(frozen=True, slots=True)
class StateSpace:
    """Its sizes."""

    n_inner: int  # channels
    n_heads: int
    n_groups: int
    n_state: int
    n_taps: int  # of the convolution

    def keys(self) -> dict[str, bytes]:
        """Return the encoded `ssm.*` keys, without the architecture's name."""
        counts = {
            "ssm.conv_kernel": self.n_taps,
            "ssm.state_size": self.n_state,
            "ssm.group_count": self.n_groups,
            "ssm.inner_size": self.n_inner,
            "ssm.time_step_rank": self.n_heads,
        }
        return {key: encode_value(value, "u32") for key, value in counts.items()}

    def shapes(self, n_embd: int) -> OwnShapes:
        """Return the shapes of its tensors, as stored and in GGUF."""
        width = self.n_inner + 2 * self.n_groups * self.n_state
        return OwnShapes(
            stored={
                "ssm_in.weight": (self.n_inner + width + self.n_heads, n_embd),
                "ssm_conv1d.weight": (width, 1, self.n_taps),
                "ssm_conv1d.bias": (width,),
                "ssm_dt.bias": (self.n_heads,),
                "ssm_a": (self.n_heads,),
                "ssm_d": (self.n_heads,),
                "ssm_norm.weight": (self.n_inner,),
                "ssm_out.weight": (n_embd, self.n_inner),
            },
            in_gguf={
                "ssm_conv1d.weight": (width, self.n_taps),
                "ssm_a": (self.n_heads, 1),
                "ssm_d": (self.n_heads, 1),
                "ssm_norm.weight": (self.n_groups, self.n_inner // self.n_groups),
            },
        )


def expanded_width(check: Checker, n_embd: int) -> int:
    """Return the channels that follow from the width of the model."""
    return n_embd * check.count("mamba_expand", most=MAX_COUNT // n_embd)


def read_state_space(check: Checker, n_inner: int) -> StateSpace:
    """Read the sizes, and refuse what `build_mamba2_layer` of llama.cpp does not compute.

    Parameters
    ----------
    check : Checker
        Of config.json.
    n_inner : int
        Channels.
    """
    space = StateSpace(
        n_inner=n_inner,
        n_heads=check.count("mamba_n_heads"),
        n_groups=check.count("mamba_n_groups"),
        n_state=check.count("mamba_d_state"),
        n_taps=check.count("mamba_d_conv"),
    )
    for key, count in (("mamba_n_heads", space.n_heads), ("mamba_n_groups", space.n_groups)):
        if n_inner % count:
            raise check.refuse(key, count, f"a divisor of the {n_inner} channels")
    if (head := check.get("mamba_d_head")) not in (None, "auto", n_inner // space.n_heads):
        raise check.refuse("mamba_d_head", head, f"{n_inner} channels / {space.n_heads} heads")
    if check.flag("mamba_proj_bias"):
        raise check.unlike("mamba_proj_bias", True, "none")
    if check.get("mamba_conv_bias") is False:
        raise check.unlike("mamba_conv_bias", False, "true")
    if not _is_unlimited(check.get("time_step_limit")):
        raise check.unlike("time_step_limit", check.get("time_step_limit"), "no limit")
    return space


def _is_unlimited(limit: object) -> bool:
    """Tell whether time steps may be of any length; transformers 5 saves infinity as an object."""
    if limit is None:
        return True
    if not isinstance(limit, list) or len(limit) != 2:
        return False
    low, high = limit
    is_infinite = isinstance(high, float) and isinf(high)
    return low == 0 and (is_infinite or high == {"__float__": "Infinity"})
