"""Numbers of a state space (Mamba and hybrids of it) that llama.cpp asserts something of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

__all__ = ["check_state_space"]

# Architectures whose layers are `build_mamba2_layer` of src/models/mamba-base.cpp
_MAMBA_2 = ("mamba2", "falcon-h1", "granitehybrid", "nemotron_h", "nemotron_h_moe")
_TWICE_AS_WIDE = ("granitehybrid", "jamba")  # asserted as their tensors are loaded
_ABSENT = -1


def check_state_space(
    architecture: str, integer: Callable[[str, int], int]
) -> Iterator[tuple[str, int, str]]:
    """Yield each number that llama.cpp ends at: its key, itself, and what it must be.

    Parameters
    ----------
    architecture : str
        GGUF's general.architecture.
    integer : function of key and default
        Reads a number of the header. Of keys that are absent, llama.cpp says so.
    """
    inner, width = integer("ssm.inner_size", _ABSENT), integer("embedding_length", _ABSENT)
    if _ABSENT in (inner, width):
        return
    if architecture in _TWICE_AS_WIDE and inner != 2 * width:
        yield "ssm.inner_size", inner, f"{2 * width}, twice embedding_length"
        return
    keys = ("ssm.time_step_rank", "ssm.group_count") if architecture in _MAMBA_2 else ()
    for key in keys:
        n = integer(key, _ABSENT)
        if n == 0 or inner % n:  # heads and groups of `inner` channels
            yield key, n, f"a divisor of the {inner} of ssm.inner_size"
