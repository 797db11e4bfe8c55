"""Slow, obviously correct NumPy twins of the codecs of few bits: Q2_K, Q3_K, IQ4, FP4, ternary, signs.

As in `tests.twins.codecs`; a search runs over all sub-blocks of a row at once, elements first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.twins.codecs import (
    F,
    Float32,
    UInt8,
    fit_affine,
    half,
    half_bytes,
    largest,
    nearest_int,
    nibble_bytes,
    nibbles,
    ordered_sum,
    truncated,
)

Int32 = NDArray[np.int32]


def pairs_of_bits(raw: UInt8) -> Int32:
    """(n, 32 m) bytes -> (n, 128 m) numbers: each 32 bytes hold four runs of 32."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    parts = raw.reshape(len(raw), -1, 1, 32) >> shifts & 3
    return parts.reshape(len(raw), -1).astype(np.int32)


def pair_bytes(q: Int32) -> UInt8:
    """Undo `pairs_of_bits`."""
    runs = (
        q.reshape(len(q), -1, 4, 32).astype(np.uint8) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    )
    return np.bitwise_or.reduce(runs, axis=2).reshape(len(q), -1)


def half_away(v: Float32) -> Int32:
    """C's lroundf, 0 for infinity and NaN."""
    v = np.where(np.isfinite(v), v, F(0)).astype(np.float64)
    return np.copysign(np.floor(np.abs(v) + 0.5), v).astype(np.int32)


# ---- Q2_K, Q3_K


def decode_q2_k(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 84)
    step = half(b[:, 80:82]) * (b[:, :16] & 15).astype(F)
    offset = half(b[:, 82:]) * (b[:, :16] >> 4).astype(F)
    q = pairs_of_bits(b[:, 16:80]).reshape(-1, 16, 16).astype(F)
    return (step[:, :, None] * q - offset[:, :, None]).ravel()


def encode_q2_k(x: Float32) -> UInt8:
    return np.concatenate([_encode_q2_k(block) for block in x.reshape(-1, 16, 16)])


def _encode_q2_k(x: Float32) -> UInt8:
    fits = [fit_affine(sub, np.abs(sub), 3, -0.5, 16, np.abs) for sub in x]
    codes, halves = [], []
    for values in (np.array([f[0] for f in fits], F), np.array([f[1] for f in fits], F)):
        most = largest(values)
        halves.append(half_bytes(np.array([[most / F(15)]], F)))
        codes.append(nearest_int((F(15) / most if most > 0 else F(0)) * values))
    code = ((codes[0] | codes[1] << 4) & 255).astype(np.uint8)
    step, offset = half(halves[0]) * (code & 15).astype(F), half(halves[1]) * (code >> 4).astype(F)
    q = np.clip(nearest_int((x + offset.T) / step.T), 0, 3)
    q = np.where(step.T != 0, q, np.stack([fit[2] for fit in fits]))  # where the scale rounds to 0
    parts = (code, pair_bytes(q.reshape(1, 256)), *halves)
    return np.concatenate([part.ravel() for part in parts])


def decode_q3_k(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 110)
    upper = np.unpackbits(b[:, :32, None], axis=-1, bitorder="little").transpose(0, 2, 1)
    q = pairs_of_bits(b[:, 32:96]) + 4 * upper.reshape(-1, 256).astype(np.int32) - 4
    low = np.concatenate([b[:, 96:104] & 15, b[:, 96:104] >> 4], -1).astype(np.int32)
    high = b[:, None, 104:108] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scale = (low | high.reshape(-1, 16).astype(np.int32) << 4) - 32
    step = half(b[:, 108:]) * scale.astype(F)
    return (step[:, :, None] * q.reshape(-1, 16, 16).astype(F)).ravel()


def fit_quants(x: Float32) -> tuple[Float32, Int32]:
    """Scales (n,) and quants (16, n) of sub-blocks (16, n), moved one by one (make_q3_quants)."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    q = np.clip(nearest_int((F(-4) / extreme) * x), -4, 3).astype(F)
    w = x * x
    sum_xl, sum_l2 = ordered_sum(w * x * q), ordered_sum(w * q * q)
    for _ in range(5):
        for i in range(16):
            xl, l2 = sum_xl - w[i] * x[i] * q[i], sum_l2 - w[i] * q[i] * q[i]
            new = np.clip(nearest_int(x[i] * l2 / xl), -4, 3).astype(F)
            new_xl, new_l2 = xl + w[i] * x[i] * new, l2 + w[i] * new * new
            better = (xl > 0) & (new != q[i]) & (new_l2 > 0)
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            q[i] = np.where(better, new, q[i])
            sum_xl, sum_l2 = np.where(better, new_xl, sum_xl), np.where(better, new_l2, sum_l2)
    zero = np.abs(extreme) < F(1e-15)
    scale = np.where(sum_l2 > 0, sum_xl / sum_l2, F(0))
    return np.where(zero, F(0), scale), np.where(zero, 0, q.astype(np.int32) + 4)


def encode_q3_k(x: Float32) -> UInt8:
    scales, kept = fit_quants(x.reshape(-1, 16).T.copy())
    rows = zip(
        x.reshape(-1, 16, 16), scales.reshape(-1, 16), kept.T.reshape(-1, 16, 16), strict=True
    )
    return np.concatenate([_encode_q3_k(*row) for row in rows])


def _encode_q3_k(x: Float32, scales: Float32, kept: Int32) -> UInt8:
    extreme = scales[np.where(np.isnan(scales), F(0), np.abs(scales)).argmax()]
    d, codes = F(0), np.zeros(16, np.int32)
    if np.abs(extreme) > 0:
        inverse = F(-32) / extreme
        d = F(1) / inverse
        codes = (
            np.clip(nearest_int(inverse * scales).astype(np.int8), -32, 31).astype(np.int32) + 32
        )
    d = half_bytes(np.array([[d]], F))
    step = (half(d) * (codes - 32).astype(F)).T
    q = np.where(step != 0, np.clip(nearest_int(x / step), -4, 3) + 4, kept).reshape(8, 32)
    upper = np.packbits((q >> 2).astype(np.uint8), axis=0, bitorder="little")
    low = codes[:8] & 15 | (codes[8:] & 15) << 4
    high = np.bitwise_or.reduce(codes.reshape(4, 4) >> 4 << np.array([[0], [2], [4], [6]]), axis=0)
    parts = (upper, pair_bytes((q & 3).reshape(1, 256)), low, high, d)
    return np.concatenate([part.ravel().astype(np.uint8) for part in parts])


# ---- IQ4_NL, IQ4_XS

LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
VALUES = np.array(LEVELS, F)


def decode_iq4_nl(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 18)
    return (half(b[:, :2]) * VALUES[nibbles(b[:, 2:])]).ravel()


def decode_iq4_xs(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 136)
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2").astype(np.int32) >> np.arange(0, 16, 2) & 3
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], -1).reshape(-1, 8)
    step = half(b[:, :2]) * ((low | high << 4) - 32).astype(F)
    values = VALUES[nibbles(b[:, 8:].reshape(-1, 16))].reshape(-1, 8, 32)
    return (step[:, :, None] * values).ravel()


def nearest_level(v: Float32) -> Int32:
    """Number of the level that is nearest, the upper of two (best_index_int8)."""
    above = np.clip(np.searchsorted(VALUES, v, side="right"), 1, 15)
    return np.where(v - VALUES[above - 1] < VALUES[above] - v, above - 1, above)


def fit_levels(x: Float32) -> Float32:
    """Scales of sub-blocks (n, 32)."""
    x = x.T.copy()
    extreme = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    scale = quality = np.zeros_like(extreme)
    for step in (None, *range(-7, 8)):
        inverse = F(1) / (extreme / F(127)) if step is None else F(step - 127) / extreme
        q = VALUES[nearest_level(inverse * x)]
        sum_xq, sum_q2 = ordered_sum(x * x * q * x), ordered_sum(x * x * q * q)
        better = (sum_q2 > 0) & (sum_xq * sum_xq > quality * sum_q2) if step is not None else True
        fitted = np.where(sum_q2 > 0, sum_xq / sum_q2, F(0))
        quality = np.where(better, fitted * sum_xq, quality)
        scale = np.where(better, fitted, scale)
    return np.where(np.abs(extreme) < F(1e-15), F(0), scale)


def reciprocal(d: Float32) -> Float32:
    return np.where(d != 0, F(1) / d, F(0))


def encode_iq4_nl(x: Float32) -> UInt8:
    x = x.reshape(-1, 32)
    scale = fit_levels(x)[:, None]
    q = nearest_level(reciprocal(scale) * x)
    return np.concatenate([half_bytes(scale), nibble_bytes(q)], -1).ravel()


def encode_iq4_xs(x: Float32) -> UInt8:
    scales = fit_levels(x.reshape(-1, 32)).reshape(-1, 8)
    known = np.where(np.isnan(scales), F(0), scales)
    most = np.abs(known).argmax(-1)[:, None]
    d = (np.take_along_axis(known, most, -1) + F(0)) / F(-32)  # of 0 and of -0, -0
    codes = np.clip(nearest_int(reciprocal(d) * scales), -32, 31)
    step = (d * codes.astype(F))[:, :, None]
    q = nearest_level(reciprocal(step) * x.reshape(-1, 8, 32))
    codes += 32
    high = np.bitwise_or.reduce(codes >> 4 << np.arange(0, 16, 2), axis=-1).astype("<u2")
    low = (codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4).astype(np.uint8)
    quants = nibble_bytes(q.reshape(-1, 32)).reshape(-1, 128)
    return np.concatenate([half_bytes(d), high[:, None].view(np.uint8), low, quants], -1).ravel()


# ---- MXFP4, NVFP4

FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], F)
UE4M3_VALUES = np.array(
    [(c % 8 / 8 + (c >= 8)) * 2.0 ** (max(c // 8, 1) - 7) for c in range(128)], F
)


def powers(e: UInt8) -> Float32:
    """Half of E8M0, the lowest of which is 2^-128."""
    return np.ldexp(F(1), e.astype(np.int32) - 128)


def half_ue4m3(code: UInt8) -> Float32:
    return np.where(code == 0x7F, F(0), UE4M3_VALUES[code & 127] / F(2))


def nearest_fp4(x: Float32, step: Float32) -> Int32:
    """Numbers of the nearest values, the first of equals."""
    return np.abs(FP4_VALUES * step[..., None] - x[..., None]).argmin(-1)


def decode_mxfp4(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 17)
    return (FP4_VALUES[nibbles(b[:, 1:])] * powers(b[:, :1])).ravel()


def encode_mxfp4(x: Float32) -> UInt8:
    x = x.reshape(-1, 32)
    most = np.abs(x).max(-1, keepdims=True)
    exponent = np.floor(np.log2(np.where(most > 0, most, F(1)).astype(np.float64)).astype(F))
    e = np.where(most > 0, exponent.astype(np.int32) + 125, 0).astype(np.uint8)
    return np.concatenate([e, nibble_bytes(nearest_fp4(x, powers(e)))], -1).ravel()


def decode_nvfp4(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 36)
    quants = b[:, 4:].reshape(-1, 4, 8)
    values = FP4_VALUES[np.concatenate([quants & 15, quants >> 4], -1)]
    return (values * half_ue4m3(b[:, :4])[:, :, None]).ravel()


def ue4m3(x: Float32) -> UInt8:
    """Codes of scales (ggml_fp32_to_ue4m3): halves up, and from 248 on the code of 448."""
    bits = np.minimum(x, F(448)).view(np.int32)
    rounded = ((bits >> 19) + 1 >> 1) - (120 << 3)
    denormal = np.minimum(truncated(x * F(512) + F(0.5)), 7)
    code = np.where(bits >> 23 <= 120, denormal, np.where(rounded < 0x78, rounded, 0x7E))
    return code.astype(np.uint8)


def encode_nvfp4(x: Float32) -> UInt8:
    x = x.reshape(-1, 4, 16)
    codes = ue4m3(np.abs(x).max(-1) / F(6))
    q = nearest_fp4(x, half_ue4m3(codes)[:, :, None])
    quants = (q[..., :8] | q[..., 8:] << 4).astype(np.uint8)
    return np.concatenate([codes, quants.reshape(-1, 32)], -1).ravel()


# ---- TQ1_0, TQ2_0

GROUPS = ((0, 160, 32), (160, 240, 16), (240, 256, 4))  # first value, last and bytes of TQ1_0


def decode_tq1_0(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 54)
    parts, first = [], 0
    for start, stop, n in GROUPS:
        n_digits = (stop - start) // n
        thirds = b[:, None, first : first + n] * 3 ** np.arange(n_digits)[:, None] & 255
        parts.append((thirds * 3 >> 8).reshape(len(b), -1))
        first += n
    return ((np.concatenate(parts, -1) - 1).astype(F) * half(b[:, 52:])).ravel()


def ternary(x: Float32) -> tuple[UInt8, Int32]:
    x = x.reshape(-1, 256)
    d = np.abs(x).max(-1, keepdims=True)
    return half_bytes(d), half_away(x * reciprocal(d)) + 1


def encode_tq1_0(x: Float32) -> UInt8:
    d, q = ternary(x)
    parts = []
    for start, stop, n in GROUPS:
        digits = q[:, start:stop].reshape(len(q), -1, n)
        number = (digits * 3 ** np.arange(4, 4 - digits.shape[1], -1)[:, None]).sum(1)
        parts.append(-(-number * 256 // 243))
    return np.concatenate([*parts, d], -1).astype(np.uint8).ravel()


def decode_tq2_0(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 66)
    return ((pairs_of_bits(b[:, :64]) - 1).astype(F) * half(b[:, 64:])).ravel()


def encode_tq2_0(x: Float32) -> UInt8:
    d, q = ternary(x)
    return np.concatenate([pair_bytes(q), d], -1).ravel()


# ---- Q1_0, Q2_0


def decode_q1_0(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 18)
    signs = np.unpackbits(b[:, 2:], axis=-1, bitorder="little")
    return np.where(signs, half(b[:, :2]), -half(b[:, :2])).ravel()


def encode_q1_0(x: Float32) -> UInt8:
    x = x.reshape(-1, 128)
    d = ordered_sum(np.abs(x).T)[:, None] / F(128)
    return np.concatenate([half_bytes(d), np.packbits(x >= 0, -1, "little")], -1).ravel()


def decode_q2_0(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 18)
    q = (b[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).astype(np.int32).reshape(-1, 64)
    return ((q - 1).astype(F) * half(b[:, :2])).ravel()


def encode_q2_0(x: Float32) -> UInt8:
    x = x.reshape(-1, 64)
    d = np.abs(x).max(-1, keepdims=True)
    q = np.where(np.isinf(reciprocal(d)), 0, half_away(x * reciprocal(d)) + 1).reshape(-1, 16, 4)
    quants = np.bitwise_or.reduce(q << np.array([0, 2, 4, 6]), axis=-1).astype(np.uint8)
    return np.concatenate([half_bytes(d), quants], -1).ravel()
