#!/usr/bin/env python3
"""Make a GGUF of a real model's shape and of any type, as fast as the disk writes it.

    tools/make_gguf.py --shape mistral-7b --type Q4_K_M --out base.gguf
    tools/make_gguf.py --shape mistral-7b --type Q4_K_M --expert 1 --out expert-1.gguf

Quantising 7B random weights takes minutes and their 14 GB of halves; this tool quantises a pool of normal
weights once, and then every tensor is a random sequence of pieces of the pool. The sequence depends on
the tensor alone and the pool of an expert is the base's plus noise, so experts differ from their base by
a small change, as fine-tunes do. Header and tensor types are those of a merge to the same type.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgemerge
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.quants.codec import CODECS, row_bytes
from edgemerge.types import Plan, TensorSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import make_tiny_model as tiny

PIECE = 256  # elements: a block of the K-quants, whole blocks of every other type
POOL = 1 << 14  # pieces: 4 M weights, whose bytes stay in the second-level cache
AT_ONCE = 1 << 15  # pieces written at a time
SCRATCH = 1 << 14  # float32 that the greediest encoder takes
NOISE_STD = 0.002


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tiny.SHAPES, required=True)
    parser.add_argument("--type", default="Q4_K_M", help="file type (%(default)s)")
    parser.add_argument("--expert", type=int, default=0, help="number of its noise; 0: the base")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"{args.out} is there already: remove it or choose another --out", file=sys.stderr)
        return 1
    plan = plan_file(args.shape, args.type)
    part = args.out.with_name(args.out.name + ".part")
    write(plan, Pools(args.expert), part)
    part.rename(args.out)
    return 0


def plan_file(shape: str, file_type: str) -> Plan:
    """Let edgemerge decide header and types, from a model whose weights are a hole in a file."""
    with tempfile.TemporaryDirectory(prefix="make-gguf-") as name:
        folder = Path(name) / shape
        folder.mkdir()
        config = tiny.make_config(shape, "F16")
        tiny.write_json(folder / "config.json", config)
        tiny.write_tokenizer(folder, int(str(config["vocab_size"])))
        tiny.lay_out(
            list(tiny.tensor_shapes(config)),
            "F16",
            1 << 62,
            folder,
            allocate=lambda fd, start, n_bytes: os.ftruncate(fd, start + n_bytes),
        )
        models = [(str(folder), None)]
        return edgemerge.plan(edgemerge.make_recipe("passthrough", models, out_type=file_type))


class Pools:
    """Pieces of quantised weights, a pool per ggml type, made when first asked for."""

    def __init__(self, expert: int) -> None:
        rng = np.random.default_rng(0)
        self._values = np.float32(tiny.INIT_STD) * rng.standard_normal(POOL * PIECE, np.float32)
        if expert:
            noise = np.random.default_rng(expert).standard_normal(POOL * PIECE, np.float32)
            self._values += np.float32(NOISE_STD) * noise
        self._pools: dict[tuple[str, bool], NDArray[np.uint8]] = {}

    def find(self, spec: TensorSpec) -> NDArray[np.uint8]:
        """Return (POOL, bytes of a piece); norms, which are vectors, lie around 1."""
        key = spec.dtype, len(spec.shape) == 1
        if key not in self._pools:
            values = self._values + np.float32(1.0) if key[1] else self._values
            pool = np.empty((POOL, row_bytes(spec.dtype, PIECE)), np.uint8)
            CODECS[spec.dtype].encode(values, pool.reshape(-1), np.empty(SCRATCH, np.float32))
            self._pools[key] = pool
        return self._pools[key]


def write(plan: Plan, pools: Pools, path: Path) -> None:
    """Write the file front to back; its pages do not stay in the page cache."""
    specs = [job.out for job in plan.jobs]
    layout = make_layout(plan.metadata, specs)
    with path.open("wb") as file:
        file.write(layout.header)
        for spec in specs:
            file.seek(layout.offsets[spec.name])
            for raw in pieces(spec, pools.find(spec)):
                file.write(raw.data)
        file.truncate(layout.n_bytes)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pieces(spec: TensorSpec, pool: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor."""
    rng = np.random.default_rng(zlib.crc32(spec.name.encode()))
    left = spec.nbytes
    while left:
        chosen = rng.integers(0, POOL, min(AT_ONCE, -(-left // pool.shape[1])), np.uint16)
        raw = pool[chosen].reshape(-1)[:left]
        left -= raw.size
        yield raw


if __name__ == "__main__":
    sys.exit(main())
