"""Do more workers, processes or adapters cost what tools/scale_model.py supposes?

    benchmarks/bench_workers.py [--work FOLDER] [--repeats N]

A base and two experts of Llama-160M's shape in Q4_K_M, 310 MB, are merged by task arithmetic: with 1, 2 and 4
workers in one process, and by 1, 2 and 4 processes at once with one worker each. Then the base is converted
with 1 to 8 adapters of rank 16. Of some runs the one of least CPU time counts, as other programs change the
wall time more. Beside the figures stand those of the model, whose lines are those of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from measure import CACHE, EDGEMERGE, ROOT, Merge, finish, make_gguf, run, table

sys.path.insert(0, str(ROOT))
from tools.scale_model import BENCHMARKS, fit, read_method

SHAPE, FILE_TYPE, METHOD = "llama-160m", "Q4_K_M", "task_arithmetic"
COUNTS = (1, 2, 4)
ADAPTERS = (1, 2, 4, 8)
BUDGET = "512MiB"
EXPERTS = 2
RANK = 16
ADAPTED = 12 * (4 * 768 * 768 + 3 * 768 * 3072) / 1e9  # of Llama-160M: all but its embeddings


@dataclass(frozen=True)
class Figures:
    """What one row took; `model_` is what the model of costs says."""

    processes: int
    workers: int
    wall_s: float
    cpu_s: float
    model_cpu_s: float
    peak_mib: float
    model_mib: float
    read_mb: float
    model_read_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    models = make_gguf(options.work, SHAPE, FILE_TYPE, EXPERTS)
    merge = Merge.of(METHOD, models, FILE_TYPE)
    _run(merge, options.work, 1, 2)  # compiles what is not compiled
    rows = []
    for processes, workers in [(1, n) for n in COUNTS] + [(n, 1) for n in COUNTS[1:]]:
        runs = [_run(merge, options.work, processes, workers) for _ in range(options.repeats)]
        rows.append(min(runs, key=lambda one: one.cpu_s))
        print(f"  {rows[-1]}", file=sys.stderr)
    adapters = _adapters(models[0], models[1], options.work, options.repeats)
    rendered = f"{render(rows)}\n\n{render_adapters(adapters)}"
    finish("workers", rendered, [asdict(one) for one in rows], adapters=adapters)


def _run(merge: Merge, work: Path, processes: int, workers: int) -> Figures:
    """Merge in some processes at once."""
    outputs = [work / f"workers-{i}.gguf" for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        done = list(pool.map(lambda path: merge.run(path, memory=BUDGET, threads=workers), outputs))
    reports = [report for _, report in done]
    model = read_method(BENCHMARKS.read_text(encoding="utf-8"))
    billions = reports[0]["elements"] / 1e9
    models = [Path(word.partition("=")[0]) for word in merge.arguments if ".gguf" in word]
    return Figures(
        processes=processes,
        workers=workers,
        wall_s=max(cost.wall_s for cost, _ in done),
        cpu_s=sum(cost.cpu_s for cost, _ in done),
        model_cpu_s=processes * model.cpu(billions, EXPERTS),
        peak_mib=max(report["peak_rss_bytes"] for report in reports) / 2**20,
        model_mib=model.peak(EXPERTS, workers),
        read_mb=sum(report["read_bytes"] for report in reports) / 1e6,
        model_read_mb=processes * sum(path.stat().st_size for path in models) / 1e6,
    )


def _adapters(base: Path, expert: Path, work: Path, repeats: int) -> dict[int, float]:
    """CPU seconds of converting a model, by the number of adapters that it has."""
    first = work / "adapter"
    if not first.exists():
        rank = ("--rank", str(RANK), "--type", "F16")
        run([*EDGEMERGE, "extract", base, expert, "-o", first, *rank])
    found = {}
    for n in ADAPTERS:
        folders = [work / f"adapter-{i}" for i in range(n)]
        for folder in folders:
            shutil.copytree(first, folder, dirs_exist_ok=True)
        source = "+".join([str(base), *(f"0.1*{folder}" for folder in folders)])
        output = work / "adapted.gguf"
        words: list[str | Path] = [
            "convert",
            source,
            "-o",
            output,
            "--type",
            FILE_TYPE,
            "--threads",
            "1",
            "--force",
        ]
        found[n] = min(run([*EDGEMERGE, *words]).cpu_s for _ in range(1 + repeats))
        output.unlink()
        print(f"  {n} adapters: {found[n]:.2f} CPU s", file=sys.stderr)
    return found


def render(rows: list[Figures]) -> str:
    """Return the table of workers and processes."""
    header = ["processes", "workers in each", "CPU s", "as the model says", "to the first row"]
    header += ["as the model says", "peak MiB of one", "as the model says", "read, MB"]
    header += ["as the model says", "wall s"]
    first = rows[0]
    return table(
        header,
        [
            [
                *(str(one.processes), str(one.workers)),
                *(f"{one.cpu_s:.2f}", f"{one.model_cpu_s:.2f}"),
                *(f"{one.cpu_s / first.cpu_s:.2f}", f"{one.model_cpu_s / first.model_cpu_s:.2f}"),
                *(f"{one.peak_mib:.0f}", f"{one.model_mib:.0f}"),
                *(f"{one.read_mb:.0f}", f"{one.model_read_mb:.0f}"),
                f"{one.wall_s:.1f}",
            ]
            for one in rows
        ],
    )


def render_adapters(found: dict[int, float]) -> str:
    """Return the table of adapters, whose last column tools/scale_model.py reads."""
    start, slope = fit(list(found.items()))
    header = ["adapters of rank 16", *map(str, found), "line"]
    cells = [f"{cpu:.2f}" for cpu in found.values()]
    line = f"{start:.2f} + {slope / ADAPTED:.2f} per adapter and billion parameters that it changes"
    return table(header, [["CPU s of a conversion", *cells, line]])


if __name__ == "__main__":
    main()
