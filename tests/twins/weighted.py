"""Slow NumPy twins of the encoders with an importance matrix.

As in `tests.twins.codecs`; a search runs over all sub-blocks at once, elements first. `FITS` are the searches
of ggml: make_qkx3_quants, make_qx_quants, make_qp_quants and quantize_row_iq4_nl_impl.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.twins.codecs import (
    F,
    Float32,
    UInt8,
    fifth_bytes,
    half,
    half_bytes,
    nearest_int,
    nibble_bytes,
    ordered_sum,
    pair_bytes,
)
from tests.twins.few_bits import VALUES, nearest_level, reciprocal

Int32 = NDArray[np.int32]


def weigh(x: Float32, importance: Float32, group: int, before: float, after: int) -> Float32:
    """Weights of rows (n_rows, n_cols), as flat as they."""
    squares = (x * x).reshape(-1, group).T
    sigma2 = F(before) * ordered_sum(squares) / F(after)
    return importance * np.sqrt(np.repeat(sigma2, group).reshape(x.shape) + x * x)


def extremes(x: Float32) -> Float32:
    """The first of the largest magnitudes in every column; NaN counts as zero."""
    known = np.where(np.isnan(x), F(0), x)
    return np.take_along_axis(known, np.abs(known).argmax(0)[None], 0)[0]


def fit_affine(x: Float32, w: Float32, top: int) -> tuple[Float32, Float32, Float32, Int32]:
    """Scales, minus minima, sums of weights (n,), and quants (16 or 32, n)."""
    sum_w, sum_x = ordered_sum(w), ordered_sum(w * x)
    low, high = np.take_along_axis(x, x.argmin(0)[None], 0)[0], x.max(0)  # the first: 0 or -0
    low = np.where(low > 0, F(0), low)
    flat = high <= low
    slope = F(top) / (high - low)
    scale = F(1) / slope
    best = np.clip(nearest_int(slope * (x - low)), 0, top)
    error = ordered_sum(w * (scale * best.astype(F) + low - x) ** 2)
    for step in range(37):
        slope = ((F(-0.9) + F(0.05) * F(step)) + F(top)) / (high - low)
        q = np.clip(nearest_int(slope * (x - low)), 0, top)
        wl = w * q.astype(F)
        sum_l, sum_l2, sum_xl = map(ordered_sum, (wl, wl * q.astype(F), wl * x))
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        new_scale = np.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low = np.where(new_low > 0, F(0), new_low)
        new_error = ordered_sum(w * (new_scale * q.astype(F) + new_low - x) ** 2)
        better = (det > 0) & (new_error < error) & ~flat
        best = np.where(better, q, best)
        error = np.where(better, new_error, error)
        scale, low = np.where(better, new_scale, scale), np.where(better, new_low, low)
    return np.where(flat, F(0), scale), -low, sum_w, np.where(flat, 0, best)


def fit_symmetric(x: Float32, w: Float32, top: int) -> tuple[Float32, Int32]:
    """Scales (n,) and quants from 0 to 2 top - 1, (16 or 32, n)."""
    extreme = extremes(x)
    best = np.zeros(x.shape, np.int32)
    scale = quality = np.zeros_like(extreme)
    for tenths in (0, *range(-9, 0), *range(1, 10)):
        slope = -(F(top) + F(0.1) * F(tenths)) / extreme
        q = np.clip(nearest_int(slope * x), -top, top - 1)
        sum_xl, sum_l2 = (
            ordered_sum(w * x * q.astype(F)),
            ordered_sum(w * q.astype(F) * q.astype(F)),
        )
        better = (sum_l2 > 0) & (sum_xl * sum_xl > quality * sum_l2) | (tenths == 0)
        fitted = np.where(sum_l2 != 0, sum_xl / sum_l2, F(0))
        best = np.where(better, q + top, best)
        scale = np.where(better, fitted, scale)
        quality = np.where(better, fitted * sum_xl, quality)
    zero = np.abs(extreme) < F(1e-15)
    return np.where(zero, F(0), scale), np.where(zero, 0, best)


def fit_positive(x: Float32, w: Float32, top: int) -> tuple[F, Int32]:
    """Scale and quants, as bytes, of one block's scales or minima (n,)."""
    most = F(0)
    for value in x:
        most = most if most > value else value
    if most < F(1e-15):
        return F(0), np.zeros(x.size, np.int32)
    slope = F(top) / most
    q = (nearest_int(slope * x) & 255).astype(F)
    diff = x - F(1) / slope * q
    best = ordered_sum(w * diff * diff)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        candidate = (F(0.1) * F(step) + F(top)) / most
        q = np.minimum(nearest_int(candidate * x), top).astype(F)
        diff = x - F(1) / candidate * q
        error = ordered_sum(w * diff * diff)
        if error < best:
            best, slope = error, candidate
    quants = np.minimum(nearest_int(slope * x), top)
    sum_xl = ordered_sum(w * x * quants.astype(F))
    sum_l2 = ordered_sum(w * quants.astype(F) * quants.astype(F))
    quants &= 255
    for _ in range(5):
        before = quants.copy()
        for i in range(x.size):
            q = F(quants[i])
            xl, l2 = sum_xl - w[i] * x[i] * q, sum_l2 - w[i] * q * q
            if not (xl > 0 and l2 > 0):
                continue
            new = np.minimum(nearest_int(np.array([x[i] * l2 / xl], F))[0], top)
            if new == quants[i]:
                continue
            xl, l2 = xl + w[i] * x[i] * F(new), l2 + w[i] * F(new) * F(new)
            if xl * xl * sum_l2 > sum_xl * sum_xl * l2:
                quants[i], sum_xl, sum_l2 = new & 255, xl, l2
        if (quants == before).all():
            break
    return (sum_xl / sum_l2 if sum_l2 > 0 else F(0)), quants


def fit_levels(x: Float32, w: Float32) -> Float32:
    """IQ4's scales of sub-blocks (32, n)."""
    extreme = extremes(x)
    scale = quality = np.zeros_like(extreme)
    for step in (None, *range(-7, 8)):
        inverse = F(1) / (-extreme / F(-127)) if step is None else F(step - 127) / extreme
        q = VALUES[nearest_level(inverse * x)]
        sum_xq, sum_q2 = ordered_sum(w * q * x), ordered_sum(w * q * q)
        better = (sum_q2 > 0) & (sum_xq * sum_xq > quality * sum_q2) if step is not None else True
        fitted = np.where(sum_q2 > 0, sum_xq / sum_q2, F(0))
        quality = np.where(better, fitted * sum_xq, quality)
        scale = np.where(better, fitted, scale)
    return np.where(np.abs(extreme) < F(1e-15), F(0), scale)


# ---- Types


def subs(values: Float32, length: int) -> Float32:
    """Sub-blocks, elements first."""
    return np.ascontiguousarray(values.reshape(-1, length).T)


def affine_super(
    x: Float32, w: Float32, top: int, length: int, scale_top: int
) -> tuple[Float32, Float32, Int32, Int32, Int32]:
    """d and dmin (n, 1), codes of scales and minima (n, subs), kept quants (n, subs, length)."""
    scales, minima, sums, kept = fit_affine(subs(x, length), subs(w, length), top)
    shape = (-1, 256 // length)
    rows = zip(scales.reshape(shape), minima.reshape(shape), sums.reshape(shape), strict=True)
    fits = [(fit_positive(s, t, scale_top), fit_positive(m, t, scale_top)) for s, m, t in rows]
    d, dmin = (np.array([[fit[i][0]] for fit in fits], F) for i in (0, 1))
    codes, floors = (np.stack([fit[i][1] for fit in fits]) for i in (0, 1))
    return d, dmin, codes, floors, kept.T.reshape(*codes.shape, length)


def requantise(
    x: Float32, step: Float32, offset: Float32, top: int, kept: Int32
) -> NDArray[np.uint8]:
    x = x.reshape(kept.shape)
    q = np.clip(nearest_int((x + offset[..., None]) / step[..., None]), 0, top)
    return np.where(step[..., None] != 0, q, kept).astype(np.uint8)


def k4_or_k5(x: Float32, importance: Float32, top: int) -> tuple[UInt8, UInt8]:
    """Heads (n, 16) and quants (n, 8, 32)."""
    w = weigh(x, importance, 256, 2, 256)
    d, dmin, a, b, kept = affine_super(x, w, top, 32, 63)
    if top == 31:
        a, b = np.minimum(a, 63), np.minimum(b, 63)
    first = np.concatenate([a[:, :4] | a[:, 4:] >> 4 << 6, b[:, :4] | b[:, 4:] >> 4 << 6], -1)
    packed = np.concatenate([first, a[:, 4:] & 15 | (b[:, 4:] & 15) << 4], -1).astype(np.uint8)
    d, dmin = half_bytes(d), half_bytes(dmin)
    q = requantise(x, half(d) * stored(packed, 0), half(dmin) * stored(packed, 4), top, kept)
    return np.concatenate([d, dmin, packed], -1), q


def stored(packed: UInt8, at: int) -> Float32:
    """Scales (at 0) or minima (at 4) as a decoder reads them (get_scale_min_k4)."""
    last = packed[:, 8:] & 15 if at == 0 else packed[:, 8:] >> 4
    low = packed[:, at : at + 4]
    return np.concatenate([low & 63, last | low >> 6 << 4], -1).astype(F)


def encode_q4_k(x: Float32, importance: Float32) -> UInt8:
    heads, q = k4_or_k5(x, importance, 15)
    blocks = zip(heads, q, strict=True)
    return np.concatenate([part for head, quants in blocks for part in (head, pair_bytes(quants))])


def encode_q5_k(x: Float32, importance: Float32) -> UInt8:
    parts = []
    for head, q in zip(*k4_or_k5(x, importance, 31), strict=True):
        parts += [head, np.packbits(q >> 4, axis=0, bitorder="little")[0], pair_bytes(q)]
    return np.concatenate(parts)


def four_runs(q: NDArray[np.uint8]) -> UInt8:
    """(n, 16, 16) quants of two bits -> (n, 64) bytes: each 32 bytes hold four runs of 32."""
    runs = q.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(runs, axis=2).reshape(-1, 64)


def encode_q2_k(x: Float32, importance: Float32) -> UInt8:
    w = weigh(x, importance, 256, 1, 256)
    d, dmin, a, b, kept = affine_super(x, w, 3, 16, 15)
    codes = (a | b << 4 & 255).astype(np.uint8)
    d, dmin = half_bytes(d), half_bytes(dmin)
    step, offset = half(d) * (codes & 15).astype(F), half(dmin) * (codes >> 4).astype(F)
    q = requantise(x, step, offset, 3, kept)
    return np.concatenate([codes, four_runs(q), d, dmin], -1).ravel()


def encode_q3_k(x: Float32, importance: Float32) -> UInt8:
    w = subs(weigh(x, importance, 256, 2, 256), 16)
    scales, kept = fit_symmetric(subs(x, 16), w, 4)
    d, codes = fit_symmetric(subs(scales, 16), subs(ordered_sum(w), 16), 32)
    codes, d = codes.T, half_bytes(d[:, None])
    step = (half(d) * (codes - 32).astype(F))[..., None]
    q = np.clip(nearest_int(x.reshape(-1, 16, 16) / step), -4, 3) + 4
    q = np.where(step != 0, q, kept.T.reshape(-1, 16, 16)).astype(np.uint8)
    upper = np.packbits((q >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    low = codes[:, :8] & 15 | (codes[:, 8:] & 15) << 4
    high = codes.reshape(-1, 4, 4) >> 4 << np.array([[0], [2], [4], [6]])
    parts = (upper, four_runs(q & 3), low, np.bitwise_or.reduce(high, axis=1), d)
    return np.concatenate([part.astype(np.uint8) for part in parts], -1).ravel()


def encode_q6_k(x: Float32, importance: Float32) -> UInt8:
    w = np.broadcast_to(importance, x.shape)
    scales, kept = fit_symmetric(subs(x, 16), subs(w, 16), 32)
    scales = scales.reshape(-1, 16)
    extreme = extremes(scales.T)[:, None]
    inverse = F(-128) / extreme
    d = half_bytes(F(1) / inverse)
    codes = np.minimum(nearest_int(inverse * scales), 127).astype(np.int8)
    step = (half(d) * codes.astype(F))[..., None]
    q = np.clip(nearest_int(x.reshape(-1, 16, 16) / step), -32, 31) + 32
    q = np.where(step != 0, q, kept.T.reshape(-1, 16, 16)).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4).reshape(-1, 128)
    high = np.bitwise_or.reduce(q >> 4 << np.array([0, 2, 4, 6])[:, None], axis=2).reshape(-1, 64)
    parts = (low, high, codes.view(np.uint8), d)
    blocks = np.concatenate([part.astype(np.uint8) for part in parts], -1)
    return np.where(np.abs(extreme) < F(1e-15), np.uint8(0), blocks).ravel()


def encode_iq4_nl(x: Float32, importance: Float32) -> UInt8:
    w = weigh(x, importance, 32, 2 / 32, 1)
    scale = fit_levels(subs(x, 32), subs(w, 32))[:, None]
    q = nearest_level(reciprocal(scale) * x.reshape(-1, 32))
    return np.concatenate([half_bytes(scale), nibble_bytes(q)], -1).ravel()


def encode_iq4_xs(x: Float32, importance: Float32) -> UInt8:
    w = weigh(x, importance, 256, 2 / 256, 1)
    scales = fit_levels(subs(x, 32), subs(w, 32)).reshape(-1, 8)
    d = (extremes(scales.T)[:, None] + F(0)) / F(-32)
    codes = np.clip(nearest_int(reciprocal(d) * scales), -32, 31)
    q = nearest_level(reciprocal((d * codes.astype(F))[..., None]) * x.reshape(-1, 8, 32))
    codes += 32
    high = np.bitwise_or.reduce(codes >> 4 << np.arange(0, 16, 2), axis=-1).astype("<u2")
    low = (codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4).astype(np.uint8)
    quants = nibble_bytes(q.reshape(-1, 32)).reshape(-1, 128)
    return np.concatenate([half_bytes(d), high[:, None].view(np.uint8), low, quants], -1).ravel()


def symmetric(x: Float32, importance: Float32, top: int) -> tuple[UInt8, Int32]:
    w = weigh(x, importance, x.shape[1], 1, x.shape[1])
    scale, q = fit_symmetric(subs(x, 32), subs(w, 32), top)
    return half_bytes(scale[:, None]), q.T


def affine(x: Float32, importance: Float32, top: int) -> tuple[UInt8, Int32]:
    w = weigh(x, importance, x.shape[1], 1, x.shape[1])
    scale, minus, _, q = fit_affine(subs(x, 32), subs(w, 32), top)
    return np.concatenate([half_bytes(scale[:, None]), half_bytes(-minus[:, None])], -1), q.T


def encode_q4_0(x: Float32, importance: Float32) -> UInt8:
    d, q = symmetric(x, importance, 8)
    return np.concatenate([d, nibble_bytes(q)], -1).ravel()


def encode_q4_1(x: Float32, importance: Float32) -> UInt8:
    head, q = affine(x, importance, 15)
    return np.concatenate([head, nibble_bytes(q)], -1).ravel()


def encode_q5_0(x: Float32, importance: Float32) -> UInt8:
    d, q = symmetric(x, importance, 16)
    return np.concatenate([d, fifth_bytes(q), nibble_bytes(q)], -1).ravel()


def encode_q5_1(x: Float32, importance: Float32) -> UInt8:
    head, q = affine(x, importance, 31)
    return np.concatenate([head, fifth_bytes(q), nibble_bytes(q)], -1).ravel()
