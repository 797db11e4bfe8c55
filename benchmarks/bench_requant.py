"""Merging GGUFs of Q4_K_M into one of Q4_K_M: how much more CPU time than its codecs alone?

    benchmarks/bench_requant.py [--shape tinyllama] [--method task_arithmetic]

A base and two experts (made by tools/make_gguf.py), which are in the page cache, are merged in a fresh
process with one worker. Beside it stands what the same run says of the codecs: every tensor of three
inputs decoded and of one output encoded, medians of runs in turn. The difference is reading, checking and
summing task vectors, checksums, writing, and the start of Python, which is also shown by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
from bench_kernels import N, aligned
from measure import CACHE, machine, make_gguf, read_in, run, table

from edgemerge import open_model
from edgemerge.formats.quants.codec import CODECS

FILE_TYPE = "Q4_K_M"
REPEATS = 7


def codec_seconds(models: list[Path], output: Path) -> float:
    """CPU seconds of decoding all inputs and encoding the output, in the calls of bench_kernels.

    As many calls as it takes, not the best of a few: a merge too has no pick of its moments.
    """
    values, back = aligned((N,)), aligned((N,))
    values[:] = np.random.default_rng(0).standard_normal(N)
    total = 0.0
    for path, direction in [*((model, "decode") for model in models), (output, "encode")]:
        source = open_model(path)
        elements: Counter[str] = Counter()
        for spec in source.specs().values():
            elements[spec.dtype] += spec.n_elements
        source.close()
        for dtype, n_elements in elements.items():
            codec = CODECS[dtype]
            raw = np.empty(N // codec.block_len * codec.block_bytes, np.uint8)
            scratch = aligned((codec.scratch_len,))
            codec.encode(values, raw, scratch)
            n_calls = -(-n_elements // N)
            started = time.process_time()
            for _ in range(n_calls):
                if direction == "encode":
                    codec.encode(values, raw, scratch)
                else:
                    codec.decode(raw, back)
            total += (time.process_time() - started) * n_elements / (n_calls * N)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--method", default="task_arithmetic")
    parser.add_argument("--memory", default="512MiB")
    options = parser.parse_args()
    models = make_gguf(options.work, options.shape, FILE_TYPE, n_experts=2)
    output = options.work / "requantised.gguf"
    base, *experts = [str(path) for path in models]
    command = [sys.executable, "-m", "edgemerge", "merge", "-m", options.method, "--base", base]
    command += [f"{expert}=0.5" for expert in experts]
    command += ["-o", str(output), "--force", "--json"]
    command += ["--type", FILE_TYPE, "--memory", options.memory, "--threads", "1"]
    run(command)  # compiles what is not compiled
    read_in(models)
    costs, codecs = [], []
    for _ in range(REPEATS):  # in turn, as the speed of a shared machine comes and goes
        costs.append(run(command))
        codecs.append(codec_seconds(models, output))
    output.unlink()
    merged, alone = median(cost.cpu_s for cost in costs), median(codecs)
    start = median(run([*command[:4], "--help"]).cpu_s for _ in range(REPEATS))
    figures = {
        "method": options.method,
        "merge_cpu_s": merged,
        "merge_wall_s": median(cost.wall_s for cost in costs),
        "codecs_cpu_s": alone,
        "python_start_cpu_s": start,
        "ratio": merged / alone,
    }
    header = ["merge", "wall s", "CPU s", "its codecs alone: CPU s", "ratio"]
    row = [f"{options.method}, {FILE_TYPE} in and out", f"{figures['merge_wall_s']:.1f}"]
    row += [f"{merged:.1f}", f"{alone:.1f}", f"{merged / alone:.2f}x"]
    print(table(header, [row]))
    print(json.dumps({"bench": "requant", "machine": machine(), "rows": [figures]}))


if __name__ == "__main__":
    main()
