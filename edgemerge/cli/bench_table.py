"""The tables of `edgemerge bench`: llama-bench's, then what llama-bench does not tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgemerge.sizes import format_size

if TYPE_CHECKING:
    from edgemerge.runtime.bench.bench import ModelBench
    from edgemerge.runtime.bench.merge_cost import MergeCost
    from edgemerge.runtime.evaluation.evaluate import Score

__all__ = ["bench_notes", "bench_tables", "markdown", "merge_table", "speed_header", "speed_rows"]

# Columns of llama-bench's own table, with its widths; those below 0 align to the left.
_SPEED = {
    "model": -30,
    "size": 10,
    "params": 10,
    "backend": -10,
    "threads": 7,
    "test": 15,
    "t/s": 20,
}


def speed_header(names: int) -> list[str]:
    """Head of llama-bench's table, its first column wider by so many letters for the files' names."""
    rules = ["-" * (abs(width) - 1) + ("-" if width < 0 else ":") for width in _widths(names)]
    return [_line(list(_SPEED), names), "| " + " | ".join(rules) + " |"]


def speed_rows(bench: ModelBench, names: int) -> list[str]:
    """Rows of llama-bench's table, one per test.

    Parameters
    ----------
    bench : ModelBench
        One model's figures.
    names : int
        Letters of the longest file name; 0 leaves the names out, as llama-bench does.
    """
    measured = bench.measured
    model = f"{measured.description} {bench.path.name}" if names else measured.description
    fixed = [model, _binary(measured.n_bytes), _decimal(measured.n_params), measured.backend]
    return [
        _line(
            [
                *fixed,
                str(speed.test.n_threads),
                speed.test.name,
                f"{speed.mean:.2f} ± {speed.deviation:.2f}",
            ],
            names,
        )
        for speed in measured.speeds
    ]


def _widths(names: int) -> list[int]:
    first, *others = _SPEED.values()
    return [first - names, *others]


def _line(cells: Sequence[str], names: int) -> str:
    padded = [
        cell.ljust(-width) if width < 0 else cell.rjust(width)
        for cell, width in zip(cells, _widths(names), strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def _binary(n_bytes: int) -> str:
    unit, size = ("GiB", 1 << 30) if n_bytes >= 1 << 30 else ("MiB", 1 << 20)
    return f"{n_bytes / size:.2f} {unit}"


def _decimal(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first align to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(padded) + " |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(header), line(rules), *map(line, rows)]


def bench_tables(benches: Sequence[ModelBench], quality: str) -> Iterator[str]:
    """Lines of the tables of latency, memory and load, with all models side by side.

    Parameters
    ----------
    benches : sequence of ModelBench
        The models' figures.
    quality : str
        Name of the questions, where there were any.
    """
    header = ["model", "threads", "latency of", "samples", "p50", "p95", "p99"]
    header += ["CPU/token", "energy/token"]
    yield from markdown(header, [row for bench in benches for row in _latency_rows(bench)])
    yield ""
    header = ["model", "load cold", "load warm", "peak memory", "weights", "KV cache", "rest"]
    header += ["°C start", "end", "highest", "slowed by", *([quality] if quality else [])]
    yield from markdown(header, [_memory_row(bench) for bench in benches])
    yield from _fastest(benches)


def _fastest(benches: Sequence[ModelBench]) -> Iterator[str]:
    """Say with how many threads each model was fastest, where several were tried."""
    for bench in benches:
        speeds = bench.measured.speeds
        if len({speed.test.n_threads for speed in speeds}) < 2:
            continue
        said = []
        for what, found in (
            ("prompts", [speed for speed in speeds if speed.test.n_prompt]),
            ("answers", [speed for speed in speeds if not speed.test.n_prompt]),
        ):
            if found:
                best = max(found, key=lambda speed: speed.mean)
                said.append(f"{what} with -t {best.test.n_threads} ({best.mean:.1f} t/s)")
        yield ""
        yield f"{bench.path.name} is fastest: {', '.join(said)}"


def _latency_rows(bench: ModelBench) -> Iterator[list[str]]:
    for speed in bench.measured.speeds:
        tokens = speed.test.n_tokens * len(speed.samples_ns)
        joules = speed.joules_per_token
        yield [
            bench.path.name,
            str(speed.test.n_threads),
            f"first token, {speed.test.name}" if speed.test.n_prompt else "each token",
            str(len(speed.latencies_ns)),
            *(_milliseconds(speed.latency(percent)) for percent in (50, 95)),
            "-" if speed.test.n_prompt else _milliseconds(speed.latency(99)),
            _milliseconds(speed.cpu_ns / 1e9 / tokens),
            "-" if joules is None else f"{joules:.3g} J",
        ]


def _memory_row(bench: ModelBench) -> list[str]:
    memory, heat, load = bench.measured.memory, bench.measured.heat, bench.load
    slowed = "-" if heat.slowed_by is None else ", ".join(heat.slowed_by) or "nothing"
    score = bench.score
    return [
        bench.path.name,
        "-" if load.cold is None else f"{load.cold:.2f} s",
        f"{load.warm:.2f} s",
        *(format_size(n) for n in (memory.peak, memory.weights, memory.kv, memory.rest)),
        *("-" if t is None else f"{t:.0f}" for t in (heat.start, heat.end, heat.highest)),
        slowed,
        *([] if score is None else [_accuracy(score)]),
    ]


def _accuracy(score: Score) -> str:
    if math.isnan(score.stderr):  # of a single question
        return f"{score.acc:.3f}"
    return f"{score.acc:.3f} ± {score.stderr:.3f}"


def _milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.3g} ms" if ms < 999.5 else f"{ms:.0f} ms"  # no 1e+03


def bench_notes(benches: Sequence[ModelBench], quality: str) -> Iterator[str]:
    """Say what the tables leave open: what the weights are, and what was not to be had."""
    mapped = (f"{b.path.name} {format_size(b.measured.memory.mapped)}" for b in benches)
    yield (
        f"weights: those in pages of the file ({', '.join(mapped)}) the kernel may drop when memory "
        "is short, and read again"
    )
    scores = [bench.score for bench in benches if bench.score is not None]
    if scores:
        yield f"{quality}: accuracy on {scores[0].n} questions ± its standard error"
    for bench in benches:
        device = bench.measured.memory.device
        if device:
            yield f"{bench.path.name}: {format_size(device)} on the GPU come on top"
        if bench.load.note:
            yield f"{bench.path.name}: no cold load: {bench.load.note}"
    yield from dict.fromkeys(
        f"energy: {bench.measured.meter}" for bench in benches if bench.measured.meter is not None
    )


def merge_table(cost: MergeCost) -> Iterator[str]:
    """Lines that tell what a merge cost."""
    header = ["merge", "type", "time", "CPU", "peak memory", "budget", "read", "written"]
    header += ["input/s", "of raw read"]
    row = [
        f"{cost.recipe.name} ({cost.method})",
        cost.file_type,
        f"{cost.seconds:.2f} s",
        f"{cost.cpu_seconds:.2f} s",
        *(format_size(n) for n in (cost.peak_rss_bytes, cost.budget_bytes)),
        *(format_size(n) for n in (cost.read_bytes, cost.written_bytes)),
        f"{cost.rate / 1e6:.1f} MB/s",
        f"{100 * cost.share:.1f} %",
    ]
    yield from markdown(header, [row])
    yield ""
    yield (
        f"raw read: {cost.raw_rate / 1e6:.1f} MB/s, one thread that reads the inputs and does "
        f"nothing with them; {cost.workers} worker{'s' * (cost.workers > 1)} merged"
    )
    if cost.note:
        yield f"inputs were not cold: {cost.note}"
