"""What each method on task vectors takes for 1.1B parameters (bf16) and Q4_K_M: processor time, memory.

    benchmarks/bench_methods.py [--memory 512MiB] [--methods NAME ...]

The models are those of bench_merge.py, made once in --work (6.6 GB). Each merge is a fresh process; ratios to
TIES of the same run are what to compare.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench_merge import FILE_TYPE, make_models
from measure import CACHE, Merge, machine, read_in, table

SETTINGS: dict[str, tuple[str, dict[str, float | str]]] = {
    "linear": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {}),
    "task arithmetic, svc": ("task_arithmetic", {"svc": "true"}),
    "LiNeS": ("lines", {"alpha": 0.6, "beta": 0.6}),
    "TIES": ("ties", {"density": 0.5}),
    "DARE-TIES": ("dare_ties", {"density": 0.6}),
    "DELLA": ("della", {"density": 0.6, "epsilon": 0.05}),
    "Breadcrumbs": ("breadcrumbs", {"density": 0.9}),
    "hierarchical": ("hierarchical", {}),
    "covariance": ("covariance", {}),
    "TSV-M": ("tsv", {}),
    "Iso-C": ("iso_c", {}),
    "Iso-CTS": ("iso_cts", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE, help="where the models are made")
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    options = parser.parse_args()
    models = make_models(options.work, "tinyllama")
    read_in(path for model in models for path in model.glob("*.safetensors"))
    output = options.work / "merged.gguf"
    rows = []
    for title in sorted({*options.methods, "TIES"}, key=list(SETTINGS).index):
        method, settings = SETTINGS[title]
        merge = Merge.of(method, models, FILE_TYPE, settings)
        cost, report = merge.run(output, memory=options.memory, threads=options.threads)
        peak_mib = report["peak_rss_bytes"] / 2**20
        rows.append({"method": title, "cpu_s": cost.cpu_s, "peak_mib": peak_mib})
    ties = next(row["cpu_s"] for row in rows if row["method"] == "TIES")
    for row in rows:
        row["ties_ratio"] = row["cpu_s"] / ties
    cells = [
        [
            row["method"],
            f"{row['cpu_s']:.1f}",
            f"{row['ties_ratio']:.2f}",
            f"{row['peak_mib']:.0f}",
        ]
        for row in rows
    ]
    print(table(["method", "CPU s", "times TIES", f"peak MiB of {options.memory}"], cells))
    about = {"threads": options.threads, **machine()}
    print(json.dumps({"machine": about, "rows": rows}))


if __name__ == "__main__":
    main()
