"""Decoding of ggml's lattice types, IQ1_S to IQ3_S, whose quants number points of a large table.

The tables and the arithmetic are those of gguf-py, llama.cpp's own package: it gives ggml's values
bit for bit, in NumPy, 80 to 160 million a second on a core. That is enough for inputs, which is all
that these types can be here: they are never written.
"""

from __future__ import annotations

import numpy as np

from edgemerge.formats.ggml_types import block_size
from edgemerge.types import Float32, UInt8

__all__ = ["LATTICE_TYPES", "decode_lattice"]

LATTICE_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")

# What gguf-py takes for its steps in between grows with the blocks: 400 KB for 64.
BLOCKS_AT_ONCE = 64


def decode_lattice(dtype: str, raw_u8: UInt8, out_f32: Float32) -> None:
    """Write the values of whole blocks (`dequantize_row_iq2_xxs` and its siblings).

    Takes up to 400 KB of memory beside its arguments, and once 70 KB for the table of a type.

    Parameters
    ----------
    dtype : str
        One of `LATTICE_TYPES`.
    raw_u8 : (n_blocks * block_bytes,) uint8
        blocks as stored
    out_f32 : (n_blocks * 256,) float32
        written
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[dtype]
    n_values, n_bytes = (BLOCKS_AT_ONCE * size for size in block_size(dtype))
    # Infinite scales of damaged blocks give NaN, which whoever reads the values looks for.
    with np.errstate(all="ignore"):
        for i in range(-(-out_f32.size // n_values)):
            values = out_f32[i * n_values : (i + 1) * n_values]
            # One long row: gguf-py goes through rows in groups of 16, which is slow for short ones
            row = raw_u8[i * n_bytes : (i + 1) * n_bytes].reshape(1, -1)
            values[:] = dequantize(row, kind).reshape(-1)
