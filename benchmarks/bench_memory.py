"""Where each MiB of a merge goes, at the smallest budget that it works in.

    benchmarks/bench_memory.py [--shape tinyllama] [--methods task_arithmetic ties]

One fresh process takes the steps that a merge takes, one after the other, and reads its resident memory
after each. Kernels are loaded by merging a tiny model of the same types; what the merge's peak has beyond
all steps is the last row. Of a mapped file the kernel may drop the pages, so they are also counted apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import CACHE, Merge, finish, make_gguf, run, table

FILE_TYPE = "Q4_K_M"
METHODS: dict[str, dict[str, float]] = {"task_arithmetic": {}, "ties": {"density": 0.5}}
# Nothing is imported before its turn. All of a merge's options come as JSON.
STEPS = """
import sys

def kib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))

steps = []
def note(name):
    steps.append((name, kib("VmRSS"), kib("RssFile")))

note("Python")
import numpy
note("NumPy")
import edgemerge.cli.merge
note("edgemerge's command line")
import edgemerge.merging.workers
from edgemerge.merging.run import merge
note("what a merge imports")
import json, pathlib
request = json.loads(sys.argv[1])

def recipe(models):
    base, *experts = models
    return edgemerge.make_recipe(
        request["method"], [(path, 0.5) for path in experts], base=base,
        parameters=request["settings"], out_type=request["file_type"],
    )

output = pathlib.Path(request["output"])
merge(recipe(request["tiny"]), output, threads=1, force=True)
note("kernels, loaded by a tiny merge")
memory = request["least_mib"] << 20
sources = [edgemerge.open_model(path) for path in request["models"]]
plan = edgemerge.plan(recipe(request["models"]), memory=memory, threads=1)
note("headers and tokenizers, plan")
for source in sources:
    source.close()
merge(recipe(request["models"]), output, memory=memory, threads=1, force=True)
arenas = plan.arena_bytes * plan.workers // 1024
print(json.dumps({"steps": steps, "arenas": arenas, "peak": kib("VmHWM")}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    found = {method: measure(method, options.work, options.shape) for method in options.methods}
    finish("memory", render(found), [{"method": name, **one} for name, one in found.items()])


def measure(method: str, work: Path, shape: str) -> dict[str, Any]:
    """Take the steps at the smallest budget; figures in MiB."""
    models, tiny = (make_gguf(work, name, FILE_TYPE, n_experts=2) for name in (shape, "zoo"))
    output = work / "memory.gguf"
    merge = Merge.of(method, models, FILE_TYPE, METHODS[method])
    least = merge.least_mib()
    merge.run(output, memory=f"{least}MiB", threads=1)  # compiles what is not compiled
    request = {
        "method": method,
        "settings": METHODS[method],
        "file_type": FILE_TYPE,
        "models": list(map(str, models)),
        "tiny": list(map(str, tiny)),
        "output": str(output),
        "least_mib": least,
    }
    noted = json.loads(run([sys.executable, "-c", STEPS, json.dumps(request)]).output)
    output.unlink()
    rows, before = [], (0, 0)
    for name, rss, mapped in noted["steps"]:
        rows.append((name, (rss - before[0]) / 1024, (mapped - before[1]) / 1024))
        before = rss, mapped
    rest = noted["peak"] - before[0] - noted["arenas"]
    rows += [("arenas of the worker", noted["arenas"] / 1024, 0.0), ("the rest", rest / 1024, 0.0)]
    return {"rows": rows, "peak_mib": noted["peak"] / 1024, "least_mib": least}


def render(found: Mapping[str, dict[str, Any]]) -> str:
    """Return the Markdown table of SPEED.md."""
    header = ["MiB at the least budget"]
    header += [f"{method}{note}" for method in found for note in ("", ", mapped files")]
    lines = []
    for at, (name, *_) in enumerate(next(iter(found.values()))["rows"]):
        figures = [one["rows"][at] for one in found.values()]
        lines.append([name, *(f"{mib:.1f}" for _, *pair in figures for mib in pair)])
    for name, key in (("peak", "peak_mib"), ("budget", "least_mib")):
        lines.append([name, *(cell for one in found.values() for cell in (f"{one[key]:.0f}", ""))])
    return table(header, lines)


if __name__ == "__main__":
    main()
