"""The figures of `edgemerge bench` as plain values, for JSON and CSV; the names are a contract."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemerge.runtime.bench.bench import ModelBench
    from edgemerge.runtime.bench.merge_cost import MergeCost
    from edgemerge.runtime.bench.speed import Speed

__all__ = ["bench_json", "csv_lines", "merge_record", "model_record", "speed_record"]


def speed_record(bench: ModelBench, speed: Speed) -> dict[str, Any]:
    """Figures of one test under llama-bench's names, then those of our own; plain values only."""
    from edgemerge.runtime.bench.speed import N_BATCH, N_UBATCH

    measured, test = bench.measured, speed.test
    kind = "first_token" if test.n_prompt else "token"
    return {
        "backends": measured.backend,
        "model_filename": str(bench.path),
        "model_type": measured.description,
        "model_size": measured.n_bytes,
        "model_n_params": measured.n_params,
        "n_batch": N_BATCH,
        "n_ubatch": N_UBATCH,
        "n_threads": test.n_threads,
        "n_gpu_layers": -1 if bench.settings.n_gpu_layers is None else bench.settings.n_gpu_layers,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.depth,
        "test_time": speed.started,
        "avg_ns": round(speed.mean_ns),
        "stddev_ns": round(speed.deviation_ns),
        "avg_ts": speed.mean,
        "stddev_ts": speed.deviation,
        "latency_of": kind,
        "latencies": len(speed.latencies_ns),
        "latency_p50_s": speed.latency(50),
        "latency_p95_s": speed.latency(95),
        "latency_p99_s": speed.latency(99),
        "cpu_s_per_token": speed.cpu_ns / 1e9 / (test.n_tokens * len(speed.samples_ns)),
        "joules_per_token": speed.joules_per_token,
    }


def model_record(bench: ModelBench) -> dict[str, Any]:
    """Figures of one model over all its tests; plain values only."""
    memory, heat, load, score = (
        bench.measured.memory,
        bench.measured.heat,
        bench.load,
        bench.score,
    )
    return {
        "load_cold_s": load.cold,
        "load_warm_s": load.warm,
        "peak_rss_bytes": memory.peak,
        "weights_bytes": memory.weights,
        "mapped_bytes": memory.mapped,
        "kv_bytes": memory.kv,
        "rest_bytes": memory.rest,
        "device_bytes": memory.device,
        "celsius_start": heat.start,
        "celsius_end": heat.end,
        "celsius_highest": heat.highest,
        "slowed_by": None if heat.slowed_by is None else ", ".join(heat.slowed_by),
        "power_meter": bench.measured.meter,
        "acc": None if score is None else score.acc,
        "acc_stderr": None if score is None or math.isnan(score.stderr) else score.stderr,
        "questions": None if score is None else score.n,
    }


def bench_json(benches: Sequence[ModelBench], quality: str) -> dict[str, Any]:
    """All figures as one object."""
    from importlib.metadata import version

    return {
        "llama_cpp_python": version("llama-cpp-python"),
        "quality": quality or None,
        "models": [
            {
                "model": str(bench.path),
                **model_record(bench),
                "load_note": bench.load.note or None,
                "tests": [
                    {
                        **speed_record(bench, speed),
                        "samples_ns": list(speed.samples_ns),
                        "samples_ts": speed.rates,
                    }
                    for speed in bench.measured.speeds
                ],
            }
            for bench in benches
        ],
    }


def merge_record(cost: MergeCost) -> dict[str, Any]:
    """Figures of a merge; plain values only."""
    figures = asdict(cost)
    raw_rate = figures.pop("raw_rate")
    return figures | {
        "recipe": str(cost.recipe),
        "read_bytes_per_s": cost.rate,
        "raw_read_bytes_per_s": raw_rate,
        "share_of_raw_read": cost.share,
        "note": cost.note or None,
    }


def csv_lines(records: Sequence[dict[str, Any]], *, header: bool) -> str:
    """Write records as CSV, quoted as llama-bench does: everything but the header."""
    out = io.StringIO()
    if header:
        out.write(",".join(records[0]) + "\n")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([["" if v is None else v for v in record.values()] for record in records])
    return out.getvalue().rstrip("\n")
