"""The table by which a Unigram vocabulary normalises text: every walk through it must stay inside."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["leaves_table"]

_ROWS = 1024  # nodes that are looked at together, each with 255 bytes that may follow
_CHECK, _VALUE = np.uint32((1 << 31) | 0xFF), np.uint32(0x7FFFFFFF)  # bits of a unit


def leaves_table(raw: bytes) -> bool:
    """Tell whether some text leads `normalize_prefix` of llama.cpp out of the table, where it throws.

    Parameters
    ----------
    raw : bytes
        Items of `tokenizer.ggml.precompiled_charsmap`: the length of a double array (u32), the array
        (u32 each: base, mark of a leaf, check), and texts that end in NUL. What is too short for this is
        left to llama.cpp, which refuses it as it loads.

    Returns
    -------
    bool
        True where a node, a value or a text lies outside.
    """
    n_bytes = int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or n_bytes + 4 >= len(raw) or n_bytes < 4:
        return False
    units = np.frombuffer(raw, "<u4", n_bytes // 4, 4)
    last_text = raw.rfind(b"\0", 4 + n_bytes) - 4 - n_bytes
    seen = np.zeros(len(units) + 256, np.bool_)
    nodes = _bases(units[:1])
    while nodes.size:
        if (nodes | 0xFF).max() >= len(units):
            return True
        found = [np.zeros(0, np.uint32)]
        for start in range(0, nodes.size, _ROWS):
            following, ends = _follow(nodes[start : start + _ROWS], units)
            if following.size and following.max() >= len(units):
                return True
            if ends.size and int((units[ends] & _VALUE).max()) > last_text:
                return True
            found.append(np.unique(following[~seen[following]]))
            seen[found[-1]] = True
        nodes = np.concatenate(found)
    return False


def _bases(units: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return what leads from a node to those after it: 22 bits, which one bit multiplies by 256."""
    width = (units >> np.uint32(6)) & np.uint32(8)
    return (units >> np.uint32(10)) << width


def _follow(
    nodes: NDArray[np.uint32], units: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the nodes one byte on, and those of them that hold a value."""
    byte = np.arange(1, 256, dtype=np.uint32)
    places = nodes[:, None] ^ byte
    at = units[places]
    fits = (at & _CHECK) == byte
    at, places = at[fits], places[fits]
    following = places ^ _bases(at)
    return following, following[(at >> 8) & 1 == 1]
