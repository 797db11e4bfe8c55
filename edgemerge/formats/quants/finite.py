"""NaN and infinity in stored bytes, found without decoding them: for tensors that are copied."""

from __future__ import annotations

import numpy as np

from edgemerge.formats.quants.codec import block_size
from edgemerge.types import UInt8

__all__ = ["find_non_finite"]

# type -> as integers, all bits but the sign, and the least of them that is no number
_FLOATS = {
    "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
}
# Where the upper byte of each half-precision scale lies in a block (`block_…` of ggml-common.h).
_SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S", "Q1_0", "Q2_0"), (1,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (1,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (1, 3)),
    "Q2_K": (81, 83),
    "Q3_K": (109,),
    "Q6_K": (209,),
    "TQ1_0": (53,),
    "TQ2_0": (65,),
}
_PIECE = 1 << 18  # bytes that are looked at together, so that the masks stay small


def find_non_finite(raw_u8: UInt8, dtype: str) -> int | None:
    """Find the first element that decodes to NaN or infinity, or the first of its block.

    Exponents of all ones are looked for, in the elements themselves or in the scales of blocks. Types
    whose scales are no halves (MXFP4, NVFP4, IQ1_M) and integers are not looked at.

    Parameters
    ----------
    raw_u8 : (n,) uint8
        Whole blocks, as stored.
    dtype : str
        ggml type name.

    Returns
    -------
    int or None
        Index of an element; None where all is finite.
    """
    block_len, block_bytes = block_size(dtype)
    step = max(1, _PIECE // block_bytes) * block_bytes
    for start in range(0, raw_u8.size, step):
        bad = _find_block(raw_u8[start : start + step], dtype, block_bytes)
        if bad is not None:
            return (start // block_bytes + bad) * block_len
    return None


def _find_block(raw_u8: UInt8, dtype: str, block_bytes: int) -> int | None:
    if dtype in _FLOATS:
        kind, mask, least = _FLOATS[dtype]
        magnitudes = raw_u8.view(kind) & mask
        if magnitudes.max() < least:
            return None
        return int((magnitudes >= least).argmax())
    blocks = raw_u8.reshape(-1, block_bytes)
    bad = np.zeros(len(blocks), np.bool_)
    for place in _SCALES.get(dtype, ()):
        bad |= blocks[:, place] & 0x7C == 0x7C
    return int(bad.argmax()) if bad.any() else None
