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

from edgemerge.formats.codec import CODECS, Codec
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
    kinds = {name: number for number, name in GGML_TYPES.items()}
    figures = [figure(name, codec, kinds[name]) for name, codec in CODECS.items()]
    print(render(figures))
    print(json.dumps({"bench": "kernels", "machine": machine(), "rows": figures}))


def figure(name: str, codec: Codec, kind: int) -> dict[str, object]:
    """Time one type in both directions; types that are only read decode random bytes."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((N_ROWS, N_COLS)).astype(np.float32)
    raw = rng.integers(0, 256, values.size // codec.block_len * codec.block_bytes, np.uint8)
    row: dict[str, object] = {"type": name}
    if codec.can_encode:
        scratch = np.empty(codec.scratch_len, np.float32)
        row["encode"] = rate(lambda: codec.encode(values.ravel(), raw, scratch))
        row["ggml_encode"] = rate(lambda: ggml_oracle.quantize(kind, values))
    back = np.empty(values.size, np.float32)
    row["decode"] = rate(lambda: codec.decode(raw, back))
    row["ggml_decode"] = rate(lambda: ggml_oracle.dequantize(kind, raw))
    return row


def render(figures: list[dict[str, object]]) -> str:
    """Return the Markdown table of the README."""
    rows = []
    for row in figures:
        cells = [str(row["type"])]
        for kind in ("encode", "decode"):
            if kind not in row:
                cells += ["", "", ""]
                continue
            ours, theirs = float(str(row[kind])), float(str(row[f"ggml_{kind}"]))
            cells += [f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.1f}x"]
        rows.append(cells)
    return table(["type", "encode", "ggml", "ratio", "decode", "ggml", "ratio"], rows)


if __name__ == "__main__":
    main()
