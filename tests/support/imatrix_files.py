"""Importance matrices for tests, in both forms that llama-imatrix has written."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Sums = Mapping[str, NDArray[np.float32]]  # GGUF tensor name -> (n_experts, n_cols)


def write_old(
    path: Path, sums: Sums, n_calls: int = 3, trailer: bytes | None = None
) -> dict[str, NDArray[np.float32]]:
    """Write the older form; return the importances, flat."""
    content = struct.pack("<i", len(sums))
    for name, values in sums.items():
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack("<ii", n_calls, values.size) + values.tobytes()
    if trailer is None:
        trailer = struct.pack("<ii", 7, 8) + b"wiki.txt"
    path.write_bytes(content + trailer)
    return {name: values.ravel() / np.float32(max(1, n_calls)) for name, values in sums.items()}


def write_gguf(
    path: Path, sums: Sums, counts: Mapping[str, NDArray[np.float32]] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Write the GGUF form; return the importances, flat."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    importances = {}
    for name, values in sums.items():
        count = np.full(len(values), 512, np.float32) if counts is None else counts[name]
        writer.add_tensor(f"{name}.in_sum2", values)
        writer.add_tensor(f"{name}.counts", count[:, None])
        mean = values / np.where(count > 0, count, np.float32(1))[:, None]
        importances[name] = np.where(count[:, None] > 0, mean, np.float32(1)).ravel()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return importances


def random_sums(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """Sums for the matrices among some tensors: a row for each expert."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal((shape[0] if len(shape) == 3 else 1, shape[-1])) ** 2).astype(
            np.float32
        )
        for name, shape in shapes.items()
        if len(shape) > 1 and name.endswith("weight")
    }
