"""Merging a base and two experts of 1.1B parameters (bf16) into one Q4_K_M GGUF: time, memory, disk.

    benchmarks/bench_merge.py                               edgemerge alone
    benchmarks/bench_merge.py --peer-python VENV/bin/python \\
        --converter llama.cpp/convert_hf_to_gguf.py         and the chain mergekit -> convert -> quantise

The models are TinyLlama's shape with random weights, made once in --work (6.6 GB). The peer's
environment needs torch and mergekit (and what the converter imports); llama-quantize is
`llama_model_quantize` of our own llama-cpp-python. Every step is a fresh process; CPU seconds and ratios
are what to compare, wall time depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from measure import Cost, machine, run, table

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgemerge" / "bench"
METHODS: dict[str, dict[str, float]] = {
    "linear": {},
    "task_arithmetic": {},
    "slerp": {"t": 0.5},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.05},
    "breadcrumbs": {"density": 0.9},
    "hierarchical": {},
}
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


def merge_ours(request: Path, work: Path, memory: str, threads: int) -> Cost:
    output = work / "ours.gguf"
    command = [sys.executable, "-m", "edgemerge", "merge", request, "-o", output, "--force"]
    cost = run(
        [*command, "--type", "Q4_K_M", "--memory", memory, "--threads", str(threads), "--json"]
    )
    output.unlink()
    return cost


def merge_theirs(request: Path, work: Path, python: Path, converter: Path) -> dict[str, Cost]:
    """Run the chain that people use today, one process per step."""
    merged, half, output = work / "merged", work / "half.gguf", work / "theirs.gguf"
    shutil.rmtree(merged, ignore_errors=True)
    threads = str(len(os.sched_getaffinity(0)))
    mergekit = python.parent / "mergekit-yaml"
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    steps = {
        "mergekit": run([mergekit, request, merged, "--random-seed", "0"], quiet),
        "convert": run([python, converter, merged, "--outtype", "f16", "--outfile", half], quiet),
        "quantise": run([sys.executable, "-c", QUANTIZE, half, output, threads]),
    }
    temporary = sum(p.stat().st_size for p in merged.rglob("*")) + half.stat().st_size
    print(f"    temporary files: {temporary / 2**30:.1f} GiB", file=sys.stderr)
    shutil.rmtree(merged)
    half.unlink()
    output.unlink()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--memory", default="384MiB")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--converter", type=Path)
    parser.add_argument("--peer-methods", nargs="+", default=["linear", "task_arithmetic", "ties"])
    options = parser.parse_args()
    if (options.peer_python is None) != (options.converter is None):
        parser.error("--peer-python and --converter go together")
    models = make_models(options.work, options.shape)
    threads = len(os.sched_getaffinity(0))
    figures: list[dict[str, object]] = []
    for method in options.methods:
        request = options.work / "recipe.yml"
        request.write_text(recipe(method, models))
        merge_ours(request, options.work, options.memory, threads)  # compiles what is not compiled
        cost = merge_ours(request, options.work, options.memory, threads)
        row: dict[str, object] = {"method": method, **_figures(cost)}
        if options.peer_python is not None and method in options.peer_methods:
            steps = merge_theirs(request, options.work, options.peer_python, options.converter)
            row["chain"] = {
                "wall_s": sum(step.wall_s for step in steps.values()),
                "cpu_s": sum(step.cpu_s for step in steps.values()),
                "peak_rss_mib": max(step.peak_rss_mib for step in steps.values()),
                "steps": {name: _figures(step) for name, step in steps.items()},
            }
        print(f"  {row}", file=sys.stderr)
        figures.append(row)
    print(render(figures, options.memory))
    print(json.dumps({"bench": "merge", "machine": machine(), "rows": figures}))


def _figures(cost: Cost) -> dict[str, float]:
    return {"wall_s": cost.wall_s, "cpu_s": cost.cpu_s, "peak_rss_mib": cost.peak_rss_mib}


def render(figures: list[dict[str, object]], memory: str) -> str:
    """Return the Markdown table of the README."""
    header = ["method", "edgemerge: wall s", "CPU s", f"peak MiB (budget {memory})"]
    with_chain = any("chain" in row for row in figures)
    if with_chain:
        header += ["chain: wall s", "CPU s", "peak MiB", "CPU ratio", "memory ratio"]
    rows = []
    for row in figures:
        cells = [f"{row['method']}", f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}"]
        cells.append(f"{row['peak_rss_mib']:.0f}")
        chain = row.get("chain")
        if isinstance(chain, dict):
            cells += [f"{chain['wall_s']:.0f}", f"{chain['cpu_s']:.0f}"]
            cells += [f"{chain['peak_rss_mib']:.0f}"]
            cells += [f"{chain['cpu_s'] / float(str(row['cpu_s'])):.0f}x"]
            cells += [f"{chain['peak_rss_mib'] / float(str(row['peak_rss_mib'])):.0f}x"]
        elif with_chain:
            cells += ["not run"] + [""] * 4
        rows.append(cells)
    return table(header, rows)


if __name__ == "__main__":
    main()
