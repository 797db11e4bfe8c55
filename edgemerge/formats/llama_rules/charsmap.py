"""The table by which a Unigram vocabulary normalises text: every walk through it must stay inside."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["leaves_table"]

_ROWS = 1024  # nodes that are looked at together, each with 255 bytes that may follow


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
    units = np.frombuffer(raw, "<u4", n_bytes // 4, 4).astype(np.int64)
    texts = raw[4 + n_bytes :]
    bases = (units >> 10) << ((units & (1 << 9)) >> 6)
    checks = units & ((1 << 31) | 0xFF)
    seen = np.zeros(len(units) + 256, np.bool_)
    nodes = bases[:1]
    while nodes.size:
        if (nodes | 0xFF).max() >= len(units):
            return True
        seen[nodes] = True
        nodes, ends = _follow(nodes, bases, checks, units)
        if ends.size and (ends.max() >= len(units) or _outside(units[ends], texts)):
            return True
        if nodes.size and nodes.max() >= len(units):
            return True
        nodes = nodes[~seen[nodes]]
    return False


def _follow(
    nodes: NDArray[np.int64],
    bases: NDArray[np.int64],
    checks: NDArray[np.int64],
    units: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All nodes one byte on, and those of them that hold a value."""
    byte = np.arange(1, 256)
    found, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, nodes.size, _ROWS):
        places = nodes[start : start + _ROWS, None] ^ byte
        places = places[checks[places] == byte]
        following = places ^ bases[places]
        found.append(following)
        ends.append(following[(units[places] >> 8) & 1 == 1])
    return np.unique(np.concatenate(found)), np.concatenate(ends)


def _outside(values: NDArray[np.int64], texts: bytes) -> bool:
    last_end = texts.rfind(b"\0")
    return bool(((values & 0x7FFFFFFF) > last_end).any())
