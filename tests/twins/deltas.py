"""A delta in plain loops: what a file adds to its base, and which elements are the largest."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.twins import codecs, few_bits

Float32 = NDArray[np.float32]


def decode(dtype: str, raw: NDArray[np.uint8]) -> Float32:
    """Decode blocks of a ggml type by its twin."""
    if dtype == "F32":
        return raw.view(np.float32)
    name = f"decode_{dtype.lower()}"
    module = few_bits if hasattr(few_bits, name) else codecs
    found: Float32 = getattr(module, name)(raw)
    return found.reshape(-1)


def add_delta(base: dict[str, Float32], path: Path) -> dict[str, Float32]:
    """Return the base's tensors with a delta of codes or sparse elements added."""
    reader = gguf.GGUFReader(path)
    exponents = reader.fields["delta.exponents"].contents()
    stored = {
        tensor.name: (tensor.tensor_type.name, np.array(tensor.data).reshape(-1).view(np.uint8))
        for tensor in reader.tensors
    }
    result = dict(base)
    names = list(dict.fromkeys(name.partition(".sparse_")[0] for name in stored))
    for name, exponent in zip(names, exponents, strict=True):
        shape = base[name].shape
        if name in stored:
            change = decode(*stored[name])[: base[name].size]
        else:
            ends = stored[f"{name}.sparse_end"][1].view(np.int32)
            places = stored[f"{name}.sparse_at"][1]
            values = decode(*stored[f"{name}.sparse_value"])
            change = np.zeros(256 * len(ends), np.float32)
            at = 0
            for group, end in enumerate(ends.tolist()):
                while at < end:
                    change[256 * group + int(places[at])] = values[at]
                    at += 1
            change = change[: base[name].size]
        result[name] = base[name] + np.float32(2.0**exponent) * change.reshape(shape)
    return result


def keep_largest(x: Float32, count: int) -> NDArray[np.int64]:
    """Return where the largest magnitudes are, the first of equals, in order."""
    ranked = sorted(range(x.size), key=lambda i: (-abs(float(x.flat[i])), i))
    return np.array(sorted(ranked[:count]))
