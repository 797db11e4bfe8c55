"""The types of ggml: number, name, elements and bytes of a block.

From ggml/include/ggml.h (`enum ggml_type`) and ggml/src/ggml-common.h at llama.cpp 0c1e57098, without
the types that ggml has removed. A literal, so that reading a header imports nothing;
tests/formats/quants/test_codec.py compares it with ggml itself and with gguf-py.
"""

from __future__ import annotations

__all__ = ["GGML_TYPES", "block_size", "row_bytes"]

# name: (number, elements of a block, bytes of a block)
_TABLE: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q8_1": (9, 32, 36),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18),
    "Q2_0": (42, 64, 18),
}

GGML_TYPES: dict[int, str] = {number: name for name, (number, _, _) in _TABLE.items()}
"""ggml type number -> name."""


def block_size(dtype: str) -> tuple[int, int]:
    """Return elements and bytes of one block of any ggml type, whether it has a codec or not."""
    _, block_len, block_bytes = _TABLE[dtype]
    return block_len, block_bytes


def row_bytes(dtype: str, n_cols: int) -> int:
    """Return the stored bytes of a row of `n_cols` elements, a whole number of blocks."""
    block_len, block_bytes = block_size(dtype)
    if n_cols % block_len:
        raise ValueError(f"a row of {n_cols} elements is not a whole number of {dtype} blocks")
    return n_cols // block_len * block_bytes
