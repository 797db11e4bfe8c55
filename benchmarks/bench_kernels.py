"""Codecs, one core: million elements per CPU second, beside ggml's C in the same run.

ggml is the library inside llama-cpp-python, called through ctypes (tests/ggml_oracle.py), on the same
rows of normal numbers. The first call, which compiles, is not counted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import machine, table

from edgemerge.formats.codec import CODECS
from edgemerge.formats.ggml_types import GGML_TYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests import ggml_oracle

N_ROWS, N_COLS = 256, 4096
REPEATS = 7


def rate(work: Callable[[], object]) -> float:
    """Best of some runs, in million elements per CPU second."""
    work()
    best = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return N_ROWS * N_COLS / best / 1e6


def main() -> None:
    values = np.random.default_rng(0).standard_normal(N_ROWS * N_COLS).astype(np.float32)
    kinds = {name: number for number, name in GGML_TYPES.items()}
    figures = []
    for name, codec in CODECS.items():
        raw = np.empty(values.size // codec.block_len * codec.block_bytes, np.uint8)
        scratch = np.empty(max(1, codec.scratch_len), np.float32)
        back = np.empty_like(values)
        figures.append(
            {
                "type": name,
                "encode": rate(lambda c=codec, r=raw, s=scratch: c.encode(values, r, s)),
                "ggml_encode": rate(
                    lambda n=kinds[name]: ggml_oracle.quantize(n, values.reshape(N_ROWS, N_COLS))
                ),
                "decode": rate(lambda c=codec, r=raw, b=back: c.decode(r, b)),
                "ggml_decode": rate(lambda n=kinds[name], r=raw: ggml_oracle.dequantize(n, r)),
            }
        )
    print(render(figures))
    print(json.dumps({"bench": "kernels", "machine": machine(), "rows": figures}))


def render(figures: list[dict[str, object]]) -> str:
    """Return the Markdown table of the README."""
    rows = []
    for row in figures:
        cells = [str(row["type"])]
        for kind in ("encode", "decode"):
            ours, theirs = float(str(row[kind])), float(str(row[f"ggml_{kind}"]))
            cells += [f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.1f}x"]
        rows.append(cells)
    return table(["type", "encode", "ggml", "ratio", "decode", "ggml", "ratio"], rows)


if __name__ == "__main__":
    main()
