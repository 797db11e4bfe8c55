"""What AArch64 does in one instruction and other processors may not: converting halves.

Compiled into the kernels that call it. LLVM makes instructions of these on every AArch64. On x86-64 it may
call routines instead, which kernels must not need: so a kernel asks `is_arm64`, and has another way. There
the conversions are compiled too, as functions that nobody calls, and give zero.
The plain Python functions say what the compiled ones compute.
"""

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, overload


def is_arm64():
    """Whether this is compiled for AArch64: a constant, so that LLVM drops the other way."""
    return False


def widen_half(bits):
    """Widen the bits of a binary16 to float32; NaNs become quiet."""
    return np.float32(np.uint16(bits).view(np.float16))


def narrow_half(x):
    """Round a float32 to the bits of a binary16, to nearest even; of NaNs the payload is left open."""
    return np.float32(x).astype(np.float16).view(np.uint16)


def _targets_arm64(builder):
    return builder.module.triple.startswith("aarch64")


@intrinsic
def _is_arm64(typing_context):
    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(1), _targets_arm64(builder))

    return types.boolean(), generate


@intrinsic
def _widen_half(typing_context, bits):
    def generate(context, builder, signature, arguments):
        if not _targets_arm64(builder):
            return ir.Constant(ir.FloatType(), 0.0)
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_half(typing_context, x):
    def generate(context, builder, signature, arguments):
        if not _targets_arm64(builder):
            return ir.Constant(ir.IntType(16), 0)
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


overload(is_arm64)(lambda: lambda: _is_arm64())
overload(widen_half)(lambda bits: lambda bits: _widen_half(bits))
overload(narrow_half)(lambda x: lambda x: _narrow_half(x))


@njit(cache=True, nogil=True)
def to_half(x):
    """Round a float32 to the bits of a binary16, as ggml does: NaNs become 0x7E00 or 0xFE00.

    Parameters
    ----------
    x : float32
        any value
    """
    half = narrow_half(x)
    payload = np.uint16(0x01FF) if half & 0x7FFF > 0x7C00 else np.uint16(0)
    return np.uint16(half & ~payload)
