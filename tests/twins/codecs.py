"""Slow, obviously correct NumPy twins of the kernels, written from the definitions of the formats.

A sum that ggml takes in order is taken by `ordered_sum`: NumPy's own `sum` adds in pairs.
"""

from __future__ import annotations

from decimal import Decimal
from functools import cache

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
F = np.float32

# ---- Codecs: 16-bit floats


def decode_f16(raw: UInt8) -> Float32:
    return raw.view(np.float16).astype(F)


def encode_f16(x: Float32) -> UInt8:
    return x.astype(np.float16).view(np.uint8)


def decode_bf16(raw: UInt8) -> Float32:
    return np.stack([np.zeros(raw.size // 2, np.uint16), raw.view(np.uint16)], -1).view(F).ravel()


def encode_bf16(x: Float32) -> UInt8:
    """The nearer of the two neighbours, the even one of a tie; the exponent may overflow."""
    below = x.view(np.uint32) >> 16
    neighbours = np.stack([below, below + 1]) << 16
    exact = neighbours.astype(np.uint32).view(F).astype(np.float64)
    finite = np.where(np.isinf(exact), np.copysign(2.0**128, exact), exact)
    distance = np.abs(finite - x.astype(np.float64))
    up = (distance[1] < distance[0]) | ((distance[1] == distance[0]) & (below % 2 == 1))
    return (below + up).astype(np.uint16).view(np.uint8)


# ---- Codecs: blocks of 32


def half(raw: UInt8) -> Float32:
    """(n, 2) bytes -> (n, 1) values."""
    return np.ascontiguousarray(raw).view(np.float16).astype(F)


def half_bytes(x: Float32) -> UInt8:
    """(n, 1) values -> (n, 2) bytes."""
    return x.astype(np.float16).view(np.uint8)


def nibbles(raw: UInt8) -> NDArray[np.int32]:
    """(n, 16) bytes -> (n, 32) numbers: all low halves, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], -1).astype(np.int32)


def nibble_bytes(q: NDArray[np.int32]) -> UInt8:
    return (q[:, :16] & 15 | (q[:, 16:] & 15) << 4).astype(np.uint8)


def fifth_bits(raw: UInt8) -> NDArray[np.int32]:
    return np.unpackbits(raw, axis=-1, bitorder="little").astype(np.int32)


def fifth_bytes(q: NDArray[np.int32]) -> UInt8:
    return np.packbits((q >> 4).astype(np.uint8), axis=-1, bitorder="little")


def truncated(v: Float32) -> NDArray[np.int32]:
    """C's cast to a small integer, 0 for infinity and NaN as on x86."""
    return np.where(np.isfinite(v), v, 0).astype(np.int32)


def inverse(d: Float32) -> Float32:
    return np.where(d != 0, F(1) / d, F(0))


def decode_q4_0(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 18)
    return (half(b[:, :2]) * (nibbles(b[:, 2:]) - 8).astype(F)).ravel()


def decode_q4_1(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 20)
    return (half(b[:, :2]) * nibbles(b[:, 4:]).astype(F) + half(b[:, 2:4])).ravel()


def decode_q5_0(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 22)
    q = nibbles(b[:, 6:]) + 16 * fifth_bits(b[:, 2:6]) - 16
    return (half(b[:, :2]) * q.astype(F)).ravel()


def decode_q5_1(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 24)
    q = nibbles(b[:, 8:]) + 16 * fifth_bits(b[:, 4:8])
    return (half(b[:, :2]) * q.astype(F) + half(b[:, 2:4])).ravel()


def decode_q8_0(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 34)
    return (half(b[:, :2]) * b[:, 2:].view(np.int8).astype(F)).ravel()


def symmetric(x: Float32, top: int) -> tuple[Float32, NDArray[np.int32]]:
    """Scale and quants 0 .. 2 top - 1, the value of largest magnitude on quant 0."""
    x = x.reshape(-1, 32)
    extreme = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    d = np.where(extreme == 0, F(0), extreme) / F(-top)
    return d, np.minimum(truncated(x * inverse(d) + F(top + 0.5)), 2 * top - 1)


def affine(x: Float32, top: int) -> tuple[Float32, Float32, NDArray[np.int32]]:
    """Scale, minimum and quants 0 .. top."""
    x = x.reshape(-1, 32)
    # argmin and argmax find the first of equals, which settles the sign of a zero
    low = np.take_along_axis(x, x.argmin(-1, keepdims=True), -1)
    d = (np.take_along_axis(x, x.argmax(-1, keepdims=True), -1) - low) / F(top)
    return d, low, np.minimum(truncated((x - low) * inverse(d) + F(0.5)), top)


def encode_q4_0(x: Float32) -> UInt8:
    d, q = symmetric(x, 8)
    return np.concatenate([half_bytes(d), nibble_bytes(q)], -1).ravel()


def encode_q4_1(x: Float32) -> UInt8:
    d, low, q = affine(x, 15)
    return np.concatenate([half_bytes(d), half_bytes(low), nibble_bytes(q)], -1).ravel()


def encode_q5_0(x: Float32) -> UInt8:
    d, q = symmetric(x, 16)
    return np.concatenate([half_bytes(d), fifth_bytes(q), nibble_bytes(q)], -1).ravel()


def encode_q5_1(x: Float32) -> UInt8:
    d, low, q = affine(x, 31)
    parts = [half_bytes(d), half_bytes(low), fifth_bytes(q), nibble_bytes(q)]
    return np.concatenate(parts, -1).ravel()


def encode_q8_0(x: Float32) -> UInt8:
    x = x.reshape(-1, 32)
    d = np.abs(x).max(-1, keepdims=True) / F(127)
    v = x * inverse(d)
    v = np.where(np.isfinite(v), v, F(0)).astype(np.float64)
    q = np.copysign(np.floor(np.abs(v) + 0.5), v).astype(np.int8)  # halves away from zero
    return np.concatenate([half_bytes(d), q.view(np.uint8)], -1).ravel()


# ---- Codecs: super-blocks of 256


def ordered_sum(terms: Float32) -> np.float32:
    return np.add.accumulate(terms, dtype=F)[-1]


def largest(values: Float32) -> np.float32:
    """The largest above 0, in C's order: neither -0 nor NaN is above it. NumPy's fmax returns either zero."""
    most = F(0)
    for value in values:
        most = value if value > most else most
    return most


def nearest_int(v: Float32) -> NDArray[np.int32]:
    """ggml's rounding, to even for |v| < 2^22 and what its bit trick gives elsewhere."""
    return ((v + F(12582912)).astype(F).view(np.int32) & 0x7FFFFF) - 0x400000


def scales_and_minima(packed: UInt8) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(n, 12) bytes -> 6-bit scales and minima, (n, 8) each."""
    p = packed.astype(np.int32)
    scales = np.concatenate([p[:, :4] & 63, p[:, 8:] & 15 | p[:, :4] >> 6 << 4], -1)
    minima = np.concatenate([p[:, 4:8] & 63, p[:, 8:] >> 4 | p[:, 4:8] >> 6 << 4], -1)
    return scales, minima


def decode_affine_k(raw: UInt8, q: NDArray[np.int32]) -> Float32:
    scales, minima = scales_and_minima(raw[:, 4:16])
    step, offset = half(raw[:, :2]) * scales.astype(F), half(raw[:, 2:4]) * minima.astype(F)
    return (step[:, :, None] * q.astype(F) - offset[:, :, None]).ravel()


def nibbles_k(raw: UInt8) -> NDArray[np.int32]:
    """(n, 128) bytes -> (n, 8, 32): each 32 bytes hold two sub-blocks, low halves first."""
    pairs = raw.reshape(-1, 4, 1, 32)
    return np.concatenate([pairs & 15, pairs >> 4], 2).reshape(-1, 8, 32).astype(np.int32)


def decode_q4_k(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 144)
    return decode_affine_k(b, nibbles_k(b[:, 16:]))


def decode_q5_k(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 176)
    fifth = np.unpackbits(b[:, 16:48, None], axis=-1, bitorder="little").transpose(0, 2, 1)
    return decode_affine_k(b, nibbles_k(b[:, 48:]) + 16 * fifth.astype(np.int32))


def decode_q6_k(raw: UInt8) -> Float32:
    b = raw.reshape(-1, 210)
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    q = (low.astype(np.int32) | high.astype(np.int32) << 4).reshape(-1, 16, 16) - 32
    step = half(b[:, 208:]) * b[:, 192:208].view(np.int8).astype(F)
    return (step[:, :, None] * q.astype(F)).ravel()


def fit_affine(
    x: Float32, w: Float32, top: int, first: float, steps: int, loss: np.ufunc = np.square
) -> tuple[F, F, NDArray[np.int32]]:
    """Scale, minus the minimum, and quants of one sub-block with weights w (make_qkx2_quants)."""
    sum_w, sum_x = ordered_sum(w), ordered_sum(w * x)
    low, high = x[x.argmin()], x[x.argmax()]  # the first of equals, so 0 or -0 as ggml has it
    low = F(0) if low > 0 else low
    if high == low:
        return F(0), -low, np.zeros(x.size, np.int32)
    slope = F(top) / (high - low)
    scale = F(1) / slope
    best = np.clip(nearest_int(slope * (x - low)), 0, top)
    best_error = ordered_sum(w * loss(scale * best.astype(F) + low - x))
    for step in range(steps):
        slope = ((F(first) + F(0.1) * F(step)) + F(top)) / (high - low)
        q = np.clip(nearest_int(slope * (x - low)), 0, top)
        wl = w * q.astype(F)
        sum_l, sum_l2, sum_xl = map(ordered_sum, (wl, wl * q.astype(F), wl * x))
        det = sum_w * sum_l2 - sum_l * sum_l
        if not det > 0:
            continue
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        if new_low > 0:
            new_scale, new_low = sum_xl / sum_l2, F(0)
        error = ordered_sum(w * loss(new_scale * q.astype(F) + new_low - x))
        if error < best_error:
            best, best_error, scale, low = q, error, new_scale, new_low
    return scale, -low, best


def encode_affine_k(x: Float32, top: int, first: float, steps: int) -> tuple[UInt8, UInt8]:
    """Header of 16 bytes and (8, 32) quants of one super-block."""
    x = x.reshape(8, 32)
    weights = [np.sqrt(ordered_sum(sub * sub) / F(32)) + np.abs(sub) for sub in x]
    fits = [fit_affine(sub, w, top, first, steps) for sub, w in zip(x, weights, strict=True)]
    scales, minima = np.array([f[0] for f in fits], F), np.array([f[1] for f in fits], F)
    header = np.zeros((1, 16), np.uint8)
    codes = []
    for values, at in ((scales, 0), (minima, 2)):
        most = largest(values)
        header[0, at : at + 2] = half_bytes(np.array([[most / F(63)]], F))[0]
        inv = F(63) / most if most > 0 else F(0)
        codes.append(np.minimum(nearest_int(inv * values) & 255, 63))
    a, b = codes
    header[0, 4:8] = a[:4] | a[4:] >> 4 << 6
    header[0, 8:12] = b[:4] | b[4:] >> 4 << 6
    header[0, 12:] = a[4:] & 15 | (b[4:] & 15) << 4
    step, offset = half(header[:, :2]) * a.astype(F), half(header[:, 2:4]) * b.astype(F)
    q = np.clip(nearest_int((x + offset.T) / step.T), 0, top)
    kept = np.stack([fit[2] for fit in fits])  # where the scale rounds to 0
    return header.ravel(), np.where(step.T != 0, q, kept).astype(np.uint8)


def pair_bytes(q: UInt8) -> UInt8:
    return (q[0::2] & 15 | (q[1::2] & 15) << 4).ravel()


def encode_q4_k(x: Float32) -> UInt8:
    blocks = (encode_affine_k(block, 15, -1.0, 21) for block in x.reshape(-1, 256))
    return np.concatenate([part for head, q in blocks for part in (head, pair_bytes(q))])


def encode_q5_k(x: Float32) -> UInt8:
    blocks = (encode_affine_k(block, 31, -0.5, 16) for block in x.reshape(-1, 256))
    parts = ((h, np.packbits(q >> 4, axis=0, bitorder="little")[0], q) for h, q in blocks)
    return np.concatenate([p for head, fifth, q in parts for p in (head, fifth, pair_bytes(q))])


def fit_symmetric(x: Float32) -> tuple[F, NDArray[np.int32]]:
    """Scale and quants 0 .. 63 of one sub-block (make_qx_quants with weights x squared)."""
    extreme = x[np.abs(x).argmax()]
    if abs(extreme) < F(1e-15):
        return F(0), np.zeros(16, np.int32)
    scale = quality = F(0)
    for tenths in (0, *range(-9, 0), *range(1, 10)):
        slope = -(F(32) + F(0.1) * F(tenths)) / extreme
        q = np.clip(nearest_int(slope * x), -32, 31)
        wl = x * x * q.astype(F)
        sum_xl, sum_l2 = ordered_sum(x * x * x * q.astype(F)), ordered_sum(wl * q.astype(F))
        if tenths == 0 or (sum_l2 > 0 and sum_xl * sum_xl > quality * sum_l2):
            scale, best = sum_xl / sum_l2 if sum_l2 != 0 else F(0), q
            quality = scale * sum_xl
    return scale, best + 32


def encode_q6_k(x: Float32) -> UInt8:
    return np.concatenate([_encode_q6_k(block) for block in x.reshape(-1, 16, 16)])


def _encode_q6_k(x: Float32) -> UInt8:
    fits = [fit_symmetric(sub) for sub in x]
    scales = np.array([fit[0] for fit in fits], F)
    extreme = scales[np.where(np.isnan(scales), F(0), np.abs(scales)).argmax()]
    if not abs(extreme) >= F(1e-15):
        return np.zeros(210, np.uint8)
    inv = F(-128) / extreme
    d = half_bytes(np.array([[F(1) / inv]], F))
    codes = np.minimum(nearest_int(inv * scales), 127)
    step = half(d) * codes.astype(F)
    q = np.clip(nearest_int(x / step.T), -32, 31) + 32
    q = np.where(step.T != 0, q, np.stack([fit[1] for fit in fits])).reshape(2, 4, 32)
    low = np.concatenate([q[:, :2] & 15 | (q[:, 2:] & 15) << 4]).ravel()
    high = (q[:, 0] >> 4 | q[:, 1] >> 4 << 2 | q[:, 2] >> 4 << 4 | q[:, 3] >> 4 << 6).ravel()
    parts = (low, high, codes.astype(np.int8).view(np.uint8), d.ravel())
    return np.concatenate([part.astype(np.uint8) for part in parts])


# ---- Inputs


def powers_of_ten(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correctly rounded: NumPy's power differs in the last bit between processors."""
    powers = [float(Decimal(10) ** Decimal(e)) for e in exponents.ravel().tolist()]
    return np.array(powers).reshape(exponents.shape)


def hard_rows(n_cols: int, seed: int = 0) -> Float32:
    """Finite rows that quantisers find hard, (n, n_cols)."""
    return _hard_rows(n_cols, seed).copy()


@cache
def _hard_rows(n_cols: int, seed: int) -> Float32:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    shape = (4, n_cols)
    spread = powers_of_ten(rng.uniform(-46, 38, (16, 1)))
    one_hot = np.zeros(shape)
    one_hot[np.arange(4), rng.integers(0, n_cols, 4)] = normal(4)
    outlier = normal(shape)
    outlier[:, rng.integers(0, n_cols, 4)] *= 1e4
    uneven = normal(shape)
    uneven[:, n_cols // 3 :] *= 1e-5
    zeros = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    mixed = np.where(rng.random(shape) < 0.3, np.abs(normal(shape)), zeros)
    bits = rng.integers(0, 2**32, (16, n_cols), dtype=np.uint32).view(F)
    rows = [
        *(normal(shape) * scale for scale in (1.0, 0.02, 1e-6, 1e3)),
        *(np.zeros(shape), -np.zeros(shape), zeros, mixed, -mixed, one_hot, outlier, uneven),
        *(np.ones(shape) * normal((4, 1)), np.abs(normal(shape)), -np.abs(normal(shape))),
        normal((16, n_cols)) * spread,  # from denormal to huge
        normal((16, n_cols)) * 1e-38 * powers_of_ten(rng.uniform(-8, 2, (16, 1))),
        np.where(rng.random(shape) < 0.5, np.finfo(F).max, np.finfo(F).min),
        np.round(normal(shape) * 2) / 4,  # many equal values and ties
        normal((16, n_cols)) * powers_of_ten(rng.uniform(-10, 10, (16, n_cols))),
        np.where(np.isfinite(bits), bits, F(1)),
    ]
    limit = float(np.finfo(F).max)
    return np.concatenate([np.clip(part, -limit, limit).astype(F) for part in rows])
