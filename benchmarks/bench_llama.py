"""Tokens per second of `edgemerge bench` beside llama.cpp's own llama-bench: the two have to agree.

    benchmarks/bench_llama.py MODEL.gguf... --peers .venv-peers
    benchmarks/bench_llama.py MODEL.gguf...         beside raw llama_cpp calls, without llama-bench

llama-bench is of the llama.cpp that llama-cpp-python carries, and runs with the very libraries of the
installed wheel. Both take turns, each in a fresh process with the same environment, so that what else the
machine does hits both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import llama_cpp
from measure import llama_program, machine, run, table

from edgemerge.runtime.bench.bench import BenchSettings, bench_model

# What llama-bench's test_prompt and test_gen do, in as little Python as can be.
RAW = """
import ctypes, json, sys, time
import llama_cpp as api

path, n_prompt, n_gen, repetitions, n_threads = sys.argv[1], *map(int, sys.argv[2:])
quiet = api.llama_log_callback(lambda level, text, data: None)
api.llama_log_set(quiet, ctypes.c_void_p(0))
api.llama_backend_init()
model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
results = []
for prompt, gen in ((n_prompt, 0), (0, n_gen)):
    n = prompt + gen
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n, 2048, 512
    params.n_threads = params.n_threads_batch = n_threads
    context = api.llama_init_from_model(model, params)
    tokens = (ctypes.c_int32 * n)(*range(100, 100 + n))
    ones = [ctypes.cast(ctypes.byref(tokens, 4 * i), ctypes.POINTER(ctypes.c_int32)) for i in range(n)]
    rates = []
    for _ in range(1 + repetitions):
        api.llama_memory_clear(api.llama_get_memory(context), False)
        start = time.perf_counter()
        for one in ones if gen else []:
            api.llama_decode(context, api.llama_batch_get_one(one, 1))
            api.llama_synchronize(context)
        for i in range(0, prompt, 2048):
            api.llama_decode(context, api.llama_batch_get_one(ones[i], min(2048, prompt - i)))
        api.llama_synchronize(context)
        rates.append(n / (time.perf_counter() - start))
    results.append(rates[1:])
    api.llama_free(context)
print(json.dumps(results))
"""

Rates = tuple[list[float], list[float]]  # tokens per second of each repetition: prompt, generation


def ours(model: Path, options: argparse.Namespace) -> Rates:
    settings = BenchSettings(
        threads=(options.threads,),
        n_prompt=options.n_prompt,
        n_gen=options.n_gen,
        repetitions=options.repetitions,
    )
    prompt, generation = bench_model(model, settings).measured.speeds
    return prompt.rates, generation.rates


def theirs(model: Path, options: argparse.Namespace) -> Rates:
    numbers = [options.n_prompt, options.n_gen, options.repetitions, options.threads]
    if options.peers is None:
        output = run([sys.executable, "-c", RAW, model, *map(str, numbers)]).output
        prompt, generation = json.loads(output.splitlines()[-1])
        return prompt, generation
    program = llama_program("llama-bench", options.peers)
    words = ["-p", "-n", "-r", "-t"]
    flags = [part for pair in zip(words, map(str, numbers), strict=True) for part in pair]
    # llama-bench looks for libllama beside itself after it looked here
    libraries = {"LD_LIBRARY_PATH": str(Path(llama_cpp.__file__).with_name("lib"))}
    output = run([program, "-m", model, *flags, "-o", "json"], libraries).output
    prompt, generation = json.loads(output[output.index("[") :])
    return prompt["samples_ts"], generation["samples_ts"]


def compare(model: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns, each first in every other round; one row per test."""
    rates: dict[str, Rates] = {"ours": ([], []), "theirs": ([], [])}
    for turn in range(options.rounds):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, measure in sides if turn % 2 else reversed(sides):
            for known, new in zip(rates[name], measure(model, options), strict=True):
                known += new
    rows = []
    for i, test in enumerate((f"pp{options.n_prompt}", f"tg{options.n_gen}")):
        mine, other = rates["ours"][i], rates["theirs"][i]
        rows.append(
            {
                "model": model.name,
                "test": test,
                "ours": statistics.median(mine),
                "theirs": statistics.median(other),
                "ratio": statistics.median(mine) / statistics.median(other),
                "ratio_of_best": max(mine) / max(other),
                "samples": len(mine),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument(
        "--peers",
        type=Path,
        help="where benchmarks/make-llama-programs builds llama-bench [default: raw calls]",
    )
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    # as edgemerge sets it where nobody has: it changes what waiting threads cost, and so the figures
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows = [row for model in options.models for row in compare(model, options)]
    peer = "llama-bench" if options.peers else "raw calls"
    header = ["model", "threads", "test", "edgemerge bench, t/s", f"{peer}, t/s"]
    header += ["ratio of medians", "ratio of the best"]
    cells = [
        [
            str(row["model"]),
            str(options.threads),
            str(row["test"]),
            *(f"{row[key]:.2f}" for key in ("ours", "theirs")),
            *(f"{row[key]:.3f}" for key in ("ratio", "ratio_of_best")),
        ]
        for row in rows
    ]
    print(table(header, cells))
    print(json.dumps({"bench": "llama", "peer": peer, "machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
