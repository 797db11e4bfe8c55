"""What LLVM has and Numba does not: instructions that convert halves, and memory on the stack.

Compiled into the kernels that call it. AArch64 has the instructions, and x86-64 with F16C. Without it LLVM
calls routines instead, which kernels must not need: so a kernel asks `converts_halves`, and has another way.
There the conversions are compiled too, as functions that nobody calls, and give zero.
The plain Python functions say what the compiled ones compute.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit
from numba.core import types
from numba.extending import intrinsic, overload

STACK_BYTES = 256
WITH_F16C = ("x86-64-v3", "x86-64-v4")  # names that imply it: no list of features says so then


def is_arm64():
    """Whether this is compiled for AArch64: a constant, so that LLVM drops the other way."""
    return False


def converts_halves():
    """Whether the processor that this is compiled for has `widen_half` and `narrow_half`: a constant."""
    return False


def widen_half(bits):
    """Widen the bits of a binary16 to float32; NaNs become quiet."""
    return np.float32(np.uint16(bits).view(np.float16))


def narrow_half(x):
    """Round a float32 to the bits of a binary16, to nearest even; of NaNs the payload is left open."""
    return np.float32(x).astype(np.float16).view(np.uint16)


def stack_bytes():
    """Return (STACK_BYTES,) uint8 of anything, which are the caller's until it returns.

    LLVM knows that nothing else is there. So it vectorises loops over them without a test of addresses, and
    leaves in registers what one loop writes and the next one reads.
    """
    return np.empty(STACK_BYTES, np.uint8)


def transpose_four(x, at, step, out, out_at, out_step):
    """Write out[out_at + k * out_step + j] = x[at + j * step + k] for j and k from 0 to 3.

    LLVM moves single numbers where a loop does that. So this is four loads, eight shuffles and four stores.

    Parameters
    ----------
    x, out : (n,) float32
        contiguous; no index is checked
    at, step, out_at, out_step : int
        where the first number is, and from there to the next row
    """
    for j in range(4):
        for k in range(4):
            out[out_at + k * out_step + j] = x[at + j * step + k]


def fill_sixteen(x, at, value):
    """Write x[at] to x[at + 15] = value, by whole vectors; LLVM stores single numbers where a loop does that.

    Parameters
    ----------
    x : (n,) float32
        contiguous; no index is checked
    at : int
        where the first number is
    value : float32
        what to write
    """
    x[at : at + 16] = value


def _targets_arm64(builder):
    return builder.module.triple.startswith("aarch64")


def _has_conversions(context, builder):
    codegen = context.codegen()
    f16c = "+f16c" in codegen._get_host_cpu_features().split(",")
    return _targets_arm64(builder) or f16c or codegen._get_host_cpu_name() in WITH_F16C


@intrinsic
def _is_arm64(typing_context):
    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(1), _targets_arm64(builder))

    return types.boolean(), generate


@intrinsic
def _converts_halves(typing_context):
    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(1), _has_conversions(context, builder))

    return types.boolean(), generate


@intrinsic
def _widen_half(typing_context, bits):
    def generate(context, builder, signature, arguments):
        if not _has_conversions(context, builder):
            return ir.Constant(ir.FloatType(), 0.0)
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_half(typing_context, x):
    def generate(context, builder, signature, arguments):
        if not _has_conversions(context, builder):
            return ir.Constant(ir.IntType(16), 0)
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _stack(typing_context):
    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            memory = builder.alloca(ir.IntType(8), STACK_BYTES)
        memory.align = 64
        return memory

    return types.voidptr(), generate


@intrinsic
def _transpose_four(typing_context, x, at, step, out, out_at, out_step):
    four = ir.VectorType(ir.FloatType(), 4)

    def place(context, builder, kind, array, index):
        data = context.make_array(kind)(context, builder, array).data
        return builder.bitcast(builder.gep(data, [index]), four.as_pointer())

    def shuffle(builder, pair, places):
        mask = ir.Constant(ir.VectorType(ir.IntType(32), 4), places)
        return builder.shuffle_vector(*pair, mask)

    def generate(context, builder, signature, arguments):
        x, at, step, out, out_at, out_step = arguments
        rows = []
        for _ in range(4):
            rows.append(builder.load(place(context, builder, signature.args[0], x, at), align=4))
            at = builder.add(at, step)
        pairs = (rows[0], rows[1]), (rows[2], rows[3])
        low = [shuffle(builder, pair, [0, 4, 1, 5]) for pair in pairs]
        high = [shuffle(builder, pair, [2, 6, 3, 7]) for pair in pairs]
        columns = [
            shuffle(builder, half, places)
            for half in (low, high)
            for places in ([0, 1, 4, 5], [2, 3, 6, 7])
        ]
        for column in columns:
            builder.store(column, place(context, builder, signature.args[3], out, out_at), align=4)
            out_at = builder.add(out_at, out_step)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, out, types.int64, types.int64), generate


@intrinsic
def _fill_sixteen(typing_context, x, at, value):
    def generate(context, builder, signature, arguments):
        x, at, value = arguments
        sixteen = ir.VectorType(ir.FloatType(), 16)
        row = builder.insert_element(ir.Constant(sixteen, ir.Undefined), value, ir.IntType(32)(0))
        places = ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
        row = builder.shuffle_vector(row, row, places)
        data = context.make_array(signature.args[0])(context, builder, x).data
        place = builder.bitcast(builder.gep(data, [at]), sixteen.as_pointer())
        builder.store(row, place, align=4)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.float32), generate


overload(is_arm64)(lambda: lambda: _is_arm64())
overload(converts_halves)(lambda: lambda: _converts_halves())
overload(widen_half)(lambda bits: lambda bits: _widen_half(bits))
overload(narrow_half)(lambda x: lambda x: _narrow_half(x))
overload(transpose_four)(
    lambda x, at, step, out, out_at, out_step: (
        lambda x, at, step, out, out_at, out_step: _transpose_four(
            x, at, step, out, out_at, out_step
        )
    )
)
overload(fill_sixteen)(lambda x, at, value: lambda x, at, value: _fill_sixteen(x, at, value))
overload(stack_bytes)(lambda: lambda: carray(_stack(), (STACK_BYTES,), np.uint8))


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
