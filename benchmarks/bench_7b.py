"""Merging a base and two experts of Mistral-7B's shape, Q4_K_M in and out, in 256 MiB: time and I/O.

    benchmarks/bench_7b.py [--memory 256MiB] [--methods task_arithmetic] [--work FOLDER]

The three files (13 GB) are made once in --work by tools/make_gguf.py. Before every run they are dropped from
the page cache, so that reading reads the disk. A plain run gives time and memory; a second one, under
tools/profile_merge.py, says how long its workers sat in reads and writes, and the whole process in fsync.
Beside it stands reading the three files once, front to back, without doing anything with them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import CACHE, Merge, figures, finish, make_gguf, read_in, table

from edgemerge.runtime.bench.load_time import drop_cache

FILE_TYPE = "Q4_K_M"
SETTINGS = {"ties": {"density": 0.5}, "dare_ties": {"density": 0.6}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic"])
    parser.add_argument("--memory", nargs="+", default=["256MiB"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    models = make_gguf(options.work, options.shape, FILE_TYPE, n_experts=2)
    warm_models = make_gguf(options.work, "zoo", FILE_TYPE, n_experts=2)
    reading = read_once(models)
    rows = []
    for method in options.methods:
        settings = SETTINGS.get(method, {})
        output = options.work / "merged.gguf"
        Merge.of(method, warm_models, FILE_TYPE, settings).run(output)  # compiles what is not
        merge = Merge.of(method, models, FILE_TYPE, settings)
        for memory in options.memory:
            row = measure(merge, models, output, memory=memory, threads=options.threads)
            rows.append({"method": method, "memory": memory, "reading_s": reading, **row})
            print(f"  {method}, {memory}: {row['wall_s']:.0f} s", file=sys.stderr)
    finish("7b", render(rows), rows, shape=options.shape)


def read_once(paths: Sequence[Path]) -> float:
    """Seconds to read files from the disk."""
    drop_cache(paths)
    started = time.monotonic()
    read_in(paths)
    return time.monotonic() - started


def measure(merge: Merge, models: Sequence[Path], output: Path, **limits: Any) -> dict[str, Any]:
    """Merge twice: as it is, and with stopwatches."""
    drop_cache(models)
    cost, report = merge.run(output, **limits)
    drop_cache(models)
    profile = merge.profile(output, **limits)
    return {
        **figures(cost),
        "merge_peak_mib": report["peak_rss_bytes"] / 2**20,
        "read_mib": report["read_bytes"] / 2**20,
        "workers": report["workers"],
        "io_share": profile["io_share"],
        "profiled_wall_s": profile["wall_s"],
        "sections": profile["sections"],
    }


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of docs/benchmarks.md; peak memory is that of the largest process."""
    header = ["method", "budget", "peak MiB", "wall s", "CPU s", "read GiB", "written GiB"]
    header += ["of the wall time in I/O", "reading the inputs alone, s"]
    lines = []
    for row in rows:
        cells = [row["method"], row["memory"], f"{row['peak_rss_mib']:.0f}"]
        cells += [f"{row['wall_s']:.0f}", f"{row['cpu_s']:.0f}"]
        cells += [f"{row['read_mib'] / 1024:.1f}", f"{row['written_mib'] / 1024:.1f}"]
        cells += [f"{100 * row['io_share']:.0f} %", f"{row['reading_s']:.0f}"]
        lines.append(cells)
    return table(header, lines)


if __name__ == "__main__":
    main()
