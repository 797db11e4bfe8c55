"""CRC-32 (IEEE 802.3, as in zlib) by carry-less multiplication, where the processor multiplies so.

A message is a polynomial over GF(2). What a checksum of it needs stays when 128 of its bits are taken away
and their product with x^n mod P is added n bits further on (Gopal et al. 2009, "Fast CRC computation using
the PCLMULQDQ instruction"). Sixteen such sums stand side by side and move on by 2048 bits a turn, in vectors
as wide as the processor multiplies: 16 GB/s with 128 bits on Zen 5, 32 with 256, 60 with 512, where zlib
1.2.13 reaches 7. Numba knows no such product, so the loop is written in LLVM's own language.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # sums of 16 bytes
FOLDED = 16 * LANES  # bytes
MULTIPLY = {1: "llvm.x86.pclmulqdq", 2: "llvm.x86.pclmulqdq.256", 4: "llvm.x86.pclmulqdq.512"}


@intrinsic
def _fold(typing_context, raw, first_factor, second_factor, state):
    """Return whether the processor can, and if so fold all of raw into state, which it starts from."""

    def generate(context, builder, signature, arguments):
        _, _, features = context.codegen().magic_tuple()
        width = _width(features.split(","))
        if width == 0:
            return cgutils.false_bit
        raw_array, state_array = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, arguments[i])
            for i in (0, 3)
        )
        _fold_all(builder, width, raw_array, arguments[1], arguments[2], state_array.data)
        return cgutils.true_bit

    return types.boolean(raw, first_factor, second_factor, state), generate


def _width(features):
    # Sums that one instruction moves on.
    if "+vpclmulqdq" in features:
        return 4 if "+avx512f" in features else 2
    return 1 if "+pclmul" in features else 0


def _fold_all(builder, width, raw_array, first_factor, second_factor, state):
    # state = low half * x^(2048 + 32) + high half * x^(2048 - 32) + the next 256 bytes, again and again
    vector = ir.VectorType(ir.IntType(64), 2 * width)
    multiply = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector, vector, ir.IntType(8)]), MULTIPLY[width]
    )
    factors = ir.Constant(vector, ir.Undefined)
    for i in range(2 * width):
        factor = second_factor if i % 2 else first_factor
        factors = builder.insert_element(factors, factor, ir.Constant(ir.IntType(32), i))
    state = builder.bitcast(state, vector.as_pointer())
    sums = [cgutils.alloca_once(builder, vector) for _ in range(LANES // width)]
    for k, total in enumerate(sums):
        place = builder.gep(state, [ir.Constant(ir.IntType(64), k)])
        builder.store(builder.load(place, align=1), total)
    pieces = builder.bitcast(raw_array.data, vector.as_pointer())
    n_turns = builder.udiv(raw_array.nitems, ir.Constant(raw_array.nitems.type, FOLDED))
    with cgutils.for_range(builder, n_turns) as turn:
        first = builder.mul(turn.index, ir.Constant(turn.index.type, len(sums)))
        for k, total in enumerate(sums):
            old = builder.load(total)
            low = builder.call(multiply, [old, factors, ir.Constant(ir.IntType(8), 0x00)])
            high = builder.call(multiply, [old, factors, ir.Constant(ir.IntType(8), 0x11)])
            at = builder.add(first, ir.Constant(first.type, k))
            piece = builder.load(builder.gep(pieces, [at]), align=1)
            builder.store(builder.xor(builder.xor(low, high), piece), total)
    for k, total in enumerate(sums):
        place = builder.gep(state, [ir.Constant(ir.IntType(64), k)])
        builder.store(builder.load(total), place, align=1)


@njit(cache=True, nogil=True)
def fold_crc32(raw_u8, first_factor, second_factor, state_u8, is_done_u8):
    """Reduce a message to 256 bytes with the same CRC-32; the message starts with those of the state.

    Parameters
    ----------
    raw_u8 : (n,) uint8
        the message behind the state, of which whole 256 bytes are taken
    first_factor, second_factor : uint64
        x^(2048 + 32) and x^(2048 - 32) modulo the polynomial, bits reversed, times two
    state_u8 : (256,) uint8
        overwritten by the result
    is_done_u8 : (1,) uint8
        written: 1, or 0 where the processor cannot and nothing was done
    """
    is_done_u8[0] = _fold(raw_u8, first_factor, second_factor, state_u8)
