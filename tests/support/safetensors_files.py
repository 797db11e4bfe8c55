"""Safetensors files as float32 arrays, for tests that spoil or move weights; bfloat16 included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Float32 = NDArray[np.float32]


def read_safetensors(path: Path) -> dict[str, Float32]:
    """Read every tensor, whatever its type, as float32."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors: dict[str, Float32] = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = (start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(
            raw[first:last], {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[entry["dtype"]]
        )
        if entry["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        tensors[name] = values.astype(np.float32).reshape(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.generic]]) -> None:
    """Write all tensors as float32."""
    arrays = {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in tensors.items()}
    path.unlink(missing_ok=True)
    save_file(arrays, path)
