"""Aligning the heads of a model with Mistral-7B's attention: exact, in how much time and memory?

Two GGUF files are made in --work (2.7 GB each): the attention tensors of 32 layers (32 heads, 8 KV heads,
width 4096) with random F16 weights, and the same with a random legal permutation of heads in every layer
and a little noise. `edgemerge align` then runs in a fresh process; beside its time stands that of reading
the same tensors once, without doing anything with them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from measure import CACHE, machine, run, table
from numpy.typing import NDArray

from edgemerge import open_model
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.types import TensorSpec

N_HEADS, N_KV_HEADS, HEAD_DIM, WIDTH = 32, 8, 128, 4096
SHAPES = {
    "attn_q": (N_HEADS * HEAD_DIM, WIDTH),
    "attn_k": (N_KV_HEADS * HEAD_DIM, WIDTH),
    "attn_v": (N_KV_HEADS * HEAD_DIM, WIDTH),
    "attn_output": (WIDTH, N_HEADS * HEAD_DIM),
}
Half = NDArray[np.float16]


def make_models(work: Path, n_layers: int) -> tuple[Path, Path, list[list[int]]]:
    """Write both files; return them and, per layer, the moved model's head for every head."""
    base, moved = work / "base.gguf", work / "moved.gguf"
    random = np.random.default_rng(0)
    specs = [
        TensorSpec(f"blk.{layer}.{stem}.weight", shape, "F16", 2 * shape[0] * shape[1])
        for layer in range(n_layers)
        for stem, shape in SHAPES.items()
    ]
    metadata = {
        "general.architecture": encode_value("llama", "str"),
        "llama.block_count": encode_value(n_layers, "u32"),
        "llama.attention.head_count": encode_value(N_HEADS, "u32"),
        "llama.attention.head_count_kv": encode_value(N_KV_HEADS, "u32"),
    }
    layout = make_layout(metadata, specs)
    truth = []
    work.mkdir(parents=True, exist_ok=True)
    with base.open("wb") as left, moved.open("wb") as right:
        for file in (left, right):
            file.write(layout.header)
        for _ in range(n_layers):
            groups = random.permutation(N_KV_HEADS)
            per_group = N_HEADS // N_KV_HEADS
            heads = np.concatenate([g * per_group + random.permutation(per_group) for g in groups])
            # moved[:, new place] = base[heads[new place]]: base's head h lies at the inverse.
            truth.append(np.argsort(heads).tolist())
            for stem, (n_rows, n_cols) in SHAPES.items():
                weights = (0.02 * random.standard_normal((n_rows, n_cols), np.float32)).astype("f2")
                left.write(weights.tobytes())
                order = groups if stem in ("attn_k", "attn_v") else heads
                noise = (0.002 * random.standard_normal(weights.shape, np.float32)).astype("f2")
                right.write((move(weights, order, stem) + noise).astype("f2").tobytes())
    return base, moved, truth


def move(weights: Half, order: NDArray[np.int64], stem: str) -> Half:
    """Permute heads: columns of o, rows of the others."""
    places = (order[:, None] * HEAD_DIM + np.arange(HEAD_DIM)).reshape(-1)
    moved: Half = weights[:, places] if stem == "attn_output" else weights[places]
    return moved


def read_once(paths: tuple[Path, ...]) -> float:
    """Seconds to read every tensor of the files, a megabyte at a time."""
    started = time.monotonic()
    buffer = np.empty(1 << 20, np.uint8)
    for path in paths:
        source = open_model(path)
        for name, spec in source.specs().items():
            rows = max(1, buffer.size // spec.row_bytes)
            for start in range(0, spec.n_rows, rows):
                stop = min(start + rows, spec.n_rows)
                source.read_rows(name, start, stop, buffer[: (stop - start) * spec.row_bytes])
        source.close()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE / "align")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--memory", default="512MiB")
    options = parser.parse_args()
    base, moved, truth = make_models(options.work, options.layers)
    reading = read_once((base, moved))
    command: list[str | Path] = [sys.executable, "-m", "edgemerge", "align", base, moved, "--json"]
    cost = run([*command, "--memory", options.memory])
    found = json.loads(cost.output)
    exact = [layer["heads"] for layer in found["layers"]] == truth
    row = {
        "layers": options.layers,
        "exact": exact,
        "seconds": found["seconds"],
        "cpu_s": cost.cpu_s,
        "reading_s": reading,
        "peak_rss_mib": cost.peak_rss_mib,
    }
    base.unlink()
    moved.unlink()
    cells = [f"{options.layers} layers, 32 heads, 8 KV heads, width 4096"]
    cells += ["yes" if exact else "NO", f"{found['seconds']:.1f}", f"{reading:.1f}"]
    cells += [f"{cost.peak_rss_mib:.0f} of {options.memory}"]
    header = ["attention of Mistral-7B", "every head found", "s", "s to read it once", "peak MiB"]
    print(table(header, [cells]))
    print(json.dumps({"bench": "align", "machine": machine(), "rows": [row]}))


if __name__ == "__main__":
    main()
