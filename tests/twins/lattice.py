"""Slow twins of the lattice codecs: gguf-py's, from its own copy of the tables, in NumPy."""

from __future__ import annotations

from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from tests.twins.codecs import Float32, UInt8


def decode_iq1_s(raw: UInt8) -> Float32:
    return _decode("IQ1_S", raw)


def decode_iq1_m(raw: UInt8) -> Float32:
    return _decode("IQ1_M", raw)


def decode_iq2_xxs(raw: UInt8) -> Float32:
    return _decode("IQ2_XXS", raw)


def decode_iq2_xs(raw: UInt8) -> Float32:
    return _decode("IQ2_XS", raw)


def decode_iq2_s(raw: UInt8) -> Float32:
    return _decode("IQ2_S", raw)


def decode_iq3_xxs(raw: UInt8) -> Float32:
    return _decode("IQ3_XXS", raw)


def decode_iq3_s(raw: UInt8) -> Float32:
    return _decode("IQ3_S", raw)


def _decode(dtype: str, raw: UInt8) -> Float32:
    values: Float32 = dequantize(raw.reshape(1, -1), GGMLQuantizationType[dtype]).ravel()
    return values
