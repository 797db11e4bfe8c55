"""Merging a base and two experts of 1.1B parameters (bf16) into one Q4_K_M GGUF: time, memory, disk.

    benchmarks/bench_merge.py                       edgemerge alone
    benchmarks/bench_merge.py --peers .venv-peers   and the chain mergekit -> convert -> quantise

The models are TinyLlama's shape with random weights, made once in --work (6.6 GB). benchmarks/make-peers
makes the peers' environment; llama-quantize is `llama_model_quantize` of our own llama-cpp-python. Every
step is a fresh process; the inputs are in the page cache. mergekit runs twice, as it comes and with one
thread, and the run of less CPU time counts; that was one thread wherever both were tried, and --once asks
only for it. All methods give the converter and the quantiser tensors of the same shapes and types, so these
two run once and count for every method. CPU seconds and ratios are what to compare; wall time depends on
what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from charts import draw_bars
from measure import CACHE, FIGURES, ROOT, Cost, Merge, figures, finish, read_in, run, table

FILE_TYPE = "Q4_K_M"
METHODS: dict[str, dict[str, float]] = {
    "linear": {},
    "task_arithmetic": {},
    "slerp": {"t": 0.5},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.05},
    "breadcrumbs": {"density": 0.9},
    "hierarchical": {},
    "covariance": {},
}
OURS = ("hierarchical", "covariance")  # which mergekit has not
MERGEKIT = {"as it comes": [], "one thread": ["--num-threads", "1"]}
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


def make_models(work: Path, shape: str) -> list[Path]:
    """Make the base and its experts, unless they are there."""
    tool = ROOT / "tools" / "make_tiny_model.py"
    base, experts = work / shape / "base", [work / shape / f"expert-{i}" for i in (1, 2)]
    for i, path in enumerate([base, *experts]):
        if not (path / "config.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            origin = ["--shape", shape] if path == base else ["--noise-of", base, "--std", "0.002"]
            run([sys.executable, tool, *origin, "--seed", str(i), "--out", path])
    return [base, *experts]


def recipe(method: str, models: list[Path]) -> str:
    """Return the same request for both tools, as mergekit's YAML."""
    base, *experts = models
    own = METHODS[method]
    if method == "slerp":
        base, experts = experts[0], experts
    entries = "".join(
        f"- model: {path}\n  parameters: {json.dumps({'weight': 0.5, **own})}\n"
        if method != "slerp"
        else f"- model: {path}\n"
        for path in experts
    )
    rest = f"parameters: {json.dumps(own)}\n" if method == "slerp" else ""
    base_line = "" if method == "linear" else f"base_model: {base}\n"
    return f"merge_method: {method}\n{base_line}models:\n{entries}{rest}dtype: bfloat16\n"


def merge_ours(
    request: Path, models: list[Path], work: Path, memory: str, threads: int
) -> dict[str, Any]:
    merge = Merge((str(request), "--type", FILE_TYPE))
    limits: dict[str, Any] = {"memory": memory, "threads": threads}
    merge.run(work / "ours.gguf", **limits)  # compiles what is not compiled
    read_in(path for model in models for path in model.glob("*.safetensors"))
    cost, report = merge.run(work / "ours.gguf", **limits)
    return {**figures(cost), "temporary_mib": cost.written_mib - report["out_bytes"] / 2**20}


class Chain:
    """What people run today: mergekit, then llama.cpp's converter, then its quantiser."""

    def __init__(self, peers: Path, work: Path) -> None:
        self._python = peers.absolute() / "bin" / "python"
        self._converter = peers.absolute() / "llama.cpp" / "convert_hf_to_gguf.py"
        self._merged, self._half, self._output = (
            work / name for name in ("merged", "half.gguf", "theirs.gguf")
        )
        self._rest: dict[str, Cost] = {}  # the steps that are the same for every method
        self._out_mib = 0.0

    def run(self, request: Path, settings: dict[str, list[str]]) -> dict[str, Any]:
        """Run the steps of one method, a process each; mergekit once by each of the settings."""
        tries = {name: self._merge(request, words) for name, words in settings.items()}
        best = min(tries, key=lambda name: tries[name].cpu_s)
        if not self._rest:
            self._convert_and_quantise()
        shutil.rmtree(self._merged)
        steps = {"mergekit": tries[best], **self._rest}
        costs = list(steps.values())
        return {
            "wall_s": sum(cost.wall_s for cost in costs),
            "cpu_s": sum(cost.cpu_s for cost in costs),
            "peak_rss_mib": max(cost.peak_rss_mib for cost in costs),
            "temporary_mib": sum(cost.written_mib for cost in costs) - self._out_mib,
            "mergekit": best,
            "steps": {name: figures(cost) for name, cost in {**steps, **tries}.items()},
        }

    def _merge(self, request: Path, words: list[str]) -> Cost:
        shutil.rmtree(self._merged, ignore_errors=True)
        program = self._python.with_name("mergekit-yaml")
        return run([program, request, self._merged, *words, "--random-seed", "0"], QUIET)

    def _convert_and_quantise(self) -> None:
        threads = str(len(os.sched_getaffinity(0)))
        to_half = ["--outtype", "f16", "--outfile", str(self._half)]
        self._rest["convert"] = run([self._python, self._converter, self._merged, *to_half], QUIET)
        self._rest["quantise"] = run(
            [sys.executable, "-c", QUANTIZE, self._half, self._output, threads]
        )
        self._out_mib = self._output.stat().st_size / 2**20
        self._half.unlink()
        self._output.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--memory", default="384MiB")
    parser.add_argument("--peers", type=Path, help="environment of benchmarks/make-peers")
    parser.add_argument(
        "--once", nargs="+", default=[], metavar="METHOD", help="run mergekit only with one thread"
    )
    parser.add_argument("--figure", type=Path, default=FIGURES / "merge.png")
    options = parser.parse_args()
    models = make_models(options.work, options.shape)
    threads = len(os.sched_getaffinity(0))
    chain = Chain(options.peers, options.work) if options.peers else None
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        request = options.work / "recipe.yml"
        request.write_text(recipe(method, models))
        row = {
            "method": method,
            **merge_ours(request, models, options.work, options.memory, threads),
        }
        if chain is not None and method not in OURS:
            one = {name: words for name, words in MERGEKIT.items() if words}
            row["chain"] = chain.run(request, one if method in options.once else MERGEKIT)
        print(f"  {row}", file=sys.stderr)
        rows.append(row)
    if chain is not None:
        draw(rows, options.figure)
    finish("merge", render(rows, options.memory), rows)


def render(rows: list[dict[str, Any]], memory: str) -> str:
    """Return the Markdown table of docs/benchmarks.md."""
    header = [
        "method",
        "edgemerge: wall s",
        "CPU s",
        f"peak MiB (budget {memory})",
        "temporary GiB",
    ]
    with_chain = any("chain" in row for row in rows)
    if with_chain:
        header += ["chain: wall s", "CPU s", "peak MiB", "temporary GiB"]
        header += ["CPU ratio", "memory ratio"]
    lines = []
    for row in rows:
        cells = [row["method"], f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}"]
        cells += [f"{row['peak_rss_mib']:.0f}", gib(row["temporary_mib"])]
        if chain := row.get("chain"):
            cells += [f"{chain['wall_s']:.0f}", f"{chain['cpu_s']:.0f}"]
            cells += [f"{chain['peak_rss_mib']:.0f}", gib(chain["temporary_mib"])]
            cells += [f"{chain[key] / row[key]:.0f}x" for key in ("cpu_s", "peak_rss_mib")]
        elif with_chain:
            cells += ["not in mergekit"] + [""] * 5
        lines.append(cells)
    return table(header, lines)


def gib(mib: float) -> str:
    """Say a size in GiB; what is less than half a unit is nothing, not minus nothing."""
    return f"{abs(mib) / 1024:.1f}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw CPU time and peak memory of both, method by method."""
    compared = [row for row in rows if "chain" in row]
    bars = {
        kind: {
            "edgemerge": [row[kind] for row in compared],
            "mergekit, convert, quantise": [row["chain"][kind] for row in compared],
        }
        for kind in ("cpu_s", "peak_rss_mib")
    }
    draw_bars(
        [row["method"] for row in compared],
        {"CPU seconds": bars["cpu_s"], "peak memory, MiB": bars["peak_rss_mib"]},
        path,
    )


if __name__ == "__main__":
    main()
