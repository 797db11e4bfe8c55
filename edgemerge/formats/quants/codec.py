"""Codecs: the bytes of a ggml type <-> float32, and the sizes of all ggml types.

`CODECS` lists the types that a merge can read: all that llama.cpp knows for weights. A merge can write all of
these but the lattice types. `block_size` and `GGML_TYPES` also know types that are not for weights: integers,
F64, and Q8_1 and Q8_K, which ggml uses for products only. Importing this module is cheap: a codec loads its
kernels when it is first used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import MismatchError
from edgemerge.formats.gguf.types import GGML_TYPES, block_size, row_bytes
from edgemerge.formats.quants.weighted import WEIGHTED_SCRATCH, WEIGHTED_TYPES, encode_weighted
from edgemerge.native import load_kernel
from edgemerge.types import Float32, TensorSpec, UInt8

__all__ = ["CODECS", "GGML_TYPES", "Codec", "block_size", "find_codec", "row_bytes"]


def _check(array: NDArray[Any], n_items: int) -> None:
    # Kernels check no bounds; F32 has no kernel, which would check the layout.
    assert array.flags.carray, "kernels take C-contiguous, aligned, writable arrays"
    assert array.size == n_items, f"{array.size} items instead of {n_items}"


@dataclass(frozen=True, slots=True)
class Codec:
    """One ggml type: how a block of its bytes becomes float32 and back.

    Both directions give ggml's bytes exactly. They keep no state, so any number of threads may share
    a codec, each with its own scratch; kernels release the GIL.
    """

    dtype: str
    kernels: str | None  # file in kernels/; None: F32, which is copied
    scratch_len: int = 0  # float32 elements that encode needs
    can_encode: bool = True

    @property
    def block_len(self) -> int:
        """Elements in one block."""
        return block_size(self.dtype)[0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return block_size(self.dtype)[1]

    def decode(self, raw_u8: UInt8, out_f32: Float32) -> None:
        """Write the values of whole blocks.

        Parameters
        ----------
        raw_u8 : (n_blocks * block_bytes,) uint8
            blocks as stored; of F16 and BF16, aligned to two bytes
        out_f32 : (n_blocks * block_len,) float32
            written
        """
        if self.kernels is None:
            out_f32.view(np.uint8)[:] = raw_u8
            return
        stored = self._stored(raw_u8, out_f32)
        load_kernel(self.kernels, f"decode_{self.dtype.lower()}")(stored, out_f32)

    @property
    def is_weighted(self) -> bool:
        """Whether an importance matrix guides the encoder; the other types take no notice of it."""
        return self.dtype in WEIGHTED_TYPES

    def encode(
        self,
        x_f32: Float32,
        out_u8: UInt8,
        scratch_f32: Float32,
        importance_f32: Float32 | None = None,
    ) -> None:
        """Write the blocks that ggml's quantiser makes of `x_f32`, where `can_encode`.

        Parameters
        ----------
        x_f32 : (n_blocks * block_len,) float32
            finite values
        out_u8 : (n_blocks * block_bytes,) uint8
            written; of F16 and BF16, aligned to two bytes
        scratch_f32 : (>= scratch_len,) float32
            overwritten with nothing of use; (>= WEIGHTED_SCRATCH,) with importances
        importance_f32 : (n_cols,) float32, optional
            how much each column matters, where `is_weighted`; `x_f32` is then whole rows
        """
        assert self.can_encode, f"{self.dtype} is only read"
        if self.kernels is None:
            out_u8[:] = x_f32.view(np.uint8)
            return
        stored = self._stored(out_u8, x_f32)
        if importance_f32 is not None:
            _check(scratch_f32[:WEIGHTED_SCRATCH], WEIGHTED_SCRATCH)
            encode_weighted(self.dtype, x_f32, importance_f32, stored, scratch_f32)
            return
        kernel = load_kernel(self.kernels, f"encode_{self.dtype.lower()}")
        if self.scratch_len:
            _check(scratch_f32[: self.scratch_len], self.scratch_len)
            kernel(x_f32, scratch_f32, stored)
        else:
            kernel(x_f32, stored)

    def _stored(self, raw_u8: UInt8, values_f32: Float32) -> NDArray[Any]:
        """View the stored side as a kernel wants it: bytes, or the patterns of a 16-bit type."""
        block_len, block_bytes = block_size(self.dtype)
        n_blocks = raw_u8.size // block_bytes
        _check(raw_u8, n_blocks * block_bytes)
        _check(values_f32, n_blocks * block_len)
        if block_len > 1:
            return raw_u8
        halves = raw_u8.view(np.uint16)
        assert halves.flags.aligned, "16-bit types start at an even address"
        return halves


CODECS: dict[str, Codec] = {
    codec.dtype: codec
    for codec in (
        Codec("F32", kernels=None),
        Codec("F16", kernels="half"),
        Codec("BF16", kernels="half"),
        Codec("Q1_0", kernels="q1_0"),
        Codec("Q2_0", kernels="q2_0"),
        Codec("Q4_0", kernels="q4_0"),
        Codec("Q4_1", kernels="q4_1"),
        Codec("Q5_0", kernels="q5_0"),
        Codec("Q5_1", kernels="q5_1"),
        Codec("Q8_0", kernels="q8_0"),
        Codec("Q2_K", kernels="q2_k", scratch_len=3456),
        Codec("Q3_K", kernels="q3_k", scratch_len=2624),
        Codec("Q4_K", kernels="q4_k", scratch_len=7552),
        Codec("Q5_K", kernels="q5_k", scratch_len=7552),
        Codec("Q6_K", kernels="q6_k", scratch_len=7424),
        Codec("IQ4_NL", kernels="iq4", scratch_len=4480),
        Codec("IQ4_XS", kernels="iq4", scratch_len=4480),
        Codec("MXFP4", kernels="fp4"),
        Codec("NVFP4", kernels="fp4"),
        Codec("TQ1_0", kernels="ternary"),
        Codec("TQ2_0", kernels="ternary"),
        Codec("IQ1_S", kernels="iq1", can_encode=False),
        Codec("IQ1_M", kernels="iq1", can_encode=False),
        Codec("IQ2_XXS", kernels="iq2", can_encode=False),
        Codec("IQ2_XS", kernels="iq2", can_encode=False),
        Codec("IQ2_S", kernels="iq2", can_encode=False),
        Codec("IQ3_XXS", kernels="iq3", can_encode=False),
        Codec("IQ3_S", kernels="iq3", can_encode=False),
    )
}
"""ggml type name -> codec. Scratch is stated here, as asking a kernel for it would import Numba."""


def find_codec(spec: TensorSpec) -> Codec:
    """Look up the codec of a tensor's type.

    Raises
    ------
    MismatchError
        The type is not for weights: integers, F64, Q8_1, Q8_K.
    """
    if spec.dtype not in CODECS:
        raise MismatchError(
            f"tensor {spec.name!r} is stored as {spec.dtype}, in which llama.cpp keeps no weights; "
            "get that model as F16, BF16 or F32",
            tensor=spec.name,
        )
    return CODECS[spec.dtype]
