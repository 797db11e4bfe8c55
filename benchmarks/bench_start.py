"""Starting up: `--help`, `import edgemerge`, the first merge after an installation, and every one after it.

    benchmarks/bench_start.py [--work FOLDER]

The merge is of a base and two experts of 3.4M parameters, which itself takes next to nothing. Its first run
finds an empty folder where compiled kernels are kept; the second finds what the first left there. Each is a
fresh process; what is quick runs some times, and the median counts. "To the first block" is from the start of
the process until the first merged rows are written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import CACHE, EDGEMERGE, Cost, Merge, finish, make_gguf, run, table

REPEATS = 7
METHODS: dict[str, dict[str, float]] = {"task_arithmetic": {}, "ties": {"density": 0.5}}
FILE_TYPE = "Q4_K_M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    options = parser.parse_args()
    models = make_gguf(options.work, "zoo", FILE_TYPE, n_experts=2)
    program = Path(sys.executable).with_name("edgemerge")
    rows = [
        command_row("python -c pass", [sys.executable, "-c", "pass"]),
        command_row("import edgemerge", [sys.executable, "-c", "import edgemerge"]),
        command_row("edgemerge --help", [program, "--help"]),
        command_row("edgemerge merge --help", [*EDGEMERGE, "merge", "--help"]),
    ]
    for method, settings in METHODS.items():
        merge = Merge.of(method, models, FILE_TYPE, settings)
        rows += merge_rows(method, merge, options.work / "started.gguf")
    finish("start", render(rows), rows)


def command_row(name: str, command: Sequence[str | Path]) -> dict[str, Any]:
    costs = [run(command) for _ in range(REPEATS)]
    return {"name": name, **median(costs)}


def median(costs: Sequence[Cost]) -> dict[str, float]:
    return {
        key: statistics.median(getattr(cost, key) for cost in costs) for key in ("wall_s", "cpu_s")
    }


def merge_rows(method: str, merge: Merge, output: Path) -> list[dict[str, Any]]:
    """Merge without compiled kernels, and with them."""
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        # Numba's cache and the user's, so that it holds however kernels are kept
        empty = {"NUMBA_CACHE_DIR": folder, "XDG_CACHE_HOME": folder}
        first = merge.profile(output, environment=empty)
        again = [merge.run(output, environment=empty) for _ in range(REPEATS)]
        profiles = [merge.profile(output, environment=empty) for _ in range(3)]
        cached = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return [
        {
            "name": f"first merge, {method}",
            "wall_s": first["wall_s"],
            "cpu_s": first["cpu_s"] + first["children_cpu_s"],
            "peak_mib": max(first["children_peak_mib"], peak_mib(first["report"])),
            "first_block_s": first["first_block_s"],
            "children_cpu_s": first["children_cpu_s"],
            "cached_mib": cached / 2**20,
        },
        {
            "name": f"second merge, {method}",
            **median([cost for cost, _ in again]),
            "peak_mib": statistics.median(peak_mib(report) for _, report in again),
            "first_block_s": statistics.median(one["first_block_s"] for one in profiles),
        },
    ]


def peak_mib(report: dict[str, Any]) -> float:
    return float(report["peak_rss_bytes"]) / 2**20


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of SPEED.md."""
    header = ["", "wall s", "CPU s", "of it compiling", "to the first block, s", "peak MiB"]
    lines = []
    for row in rows:
        cells = [row["name"], f"{row['wall_s']:.2f}", f"{row['cpu_s']:.2f}"]
        for key, digits in (("children_cpu_s", 2), ("first_block_s", 2), ("peak_mib", 0)):
            cells.append(f"{row[key]:.{digits}f}" if key in row else "")
        lines.append(cells)
    return table(header, lines)


if __name__ == "__main__":
    main()
