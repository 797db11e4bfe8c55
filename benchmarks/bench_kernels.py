"""Kernels, one core: elements and bytes per CPU second, beside ggml's C, gguf-py and memcpy in the same run.

    benchmarks/bench_kernels.py [--types Q4_K,IQ2_S] [--codecs-only] [--figure PNG]

ggml is the library inside llama-cpp-python, called through ctypes (tests/support/ggml_oracle.py).
Codecs take rows of normal numbers; types that are only read decode random bytes. All that is compared takes
turns, so that other programs hit all alike. Of each the best time counts, without the first call, which
compiles. Bytes are those of the arrays that a kernel reads and writes, each once; so are
memcpy's, which copies as many float32. What works in place touches less memory, and may go faster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from charts import COLOURS, INK, SOFT, new_figure, save
from measure import machine, table
from merge_calls import N_MODELS, merge_calls
from numpy.typing import NDArray

from edgemerge.budget import Arena
from edgemerge.formats.gguf.types import GGML_TYPES
from edgemerge.formats.quants.codec import CODECS, Codec
from edgemerge.native import load_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support import ggml_oracle

FIGURE = Path(__file__).with_name("figures") / "kernels.png"
N_ROWS, N_COLS = 256, 4096
N = N_ROWS * N_COLS
REPEATS = 7
SHORT = 0.02  # seconds; what takes less is repeated more often

Work = Callable[[], object]
Row = dict[str, float | str]


def aligned(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Memory that lies as a merge's own does: no vector spans two lines of a cache."""
    return Arena(4 * math.prod(shape)).take(shape, np.float32).view(np.float32)


def rate(work: Work) -> float:
    """Best of some runs, in million elements per CPU second."""
    return N / race({"": work})[""] / 1e6


def race(works: Mapping[str, Work], repeats: int = REPEATS) -> dict[str, float]:
    """Best CPU seconds of each; they take turns, the quick ones four at a time."""
    best = {}
    for name, work in works.items():
        work()
        best[name] = timed(work)
    turns = {name: 4 if best[name] < SHORT else 1 for name in works}
    for _ in range(repeats - 1):
        for name, work in works.items():
            for _ in range(turns[name]):
                best[name] = min(best[name], timed(work))
    return best


def timed(work: Work) -> float:
    """CPU seconds of one call."""
    started = time.process_time_ns()
    work()
    return (time.process_time_ns() - started) / 1e9


# -- codecs


def codec_figures(name: str, codec: Codec) -> Row:
    """Time one type in both directions: million elements a second, and our gigabytes."""
    kind = {dtype: number for number, dtype in GGML_TYPES.items()}[name]
    rng = np.random.default_rng(0)
    values = aligned((N_ROWS, N_COLS))
    values[:] = rng.standard_normal((N_ROWS, N_COLS))
    raw = rng.integers(0, 256, N // codec.block_len * codec.block_bytes, np.uint8)
    gigabytes = (values.nbytes + raw.nbytes) / 1e9
    row: Row = {"type": name}
    if codec.can_encode:
        scratch = aligned((codec.scratch_len,))
        works: dict[str, Work] = {
            "encode": lambda: codec.encode(values.ravel(), raw, scratch),
            "ggml_encode": lambda: ggml_oracle.quantize(kind, values, out=theirs),
        }
        theirs = np.empty_like(raw)
        row |= rates(works | gguf_works("encode", name, values, raw), gigabytes)
    back, others = aligned((N,)), aligned((N,))
    works = {
        "decode": lambda: codec.decode(raw, back),
        "ggml_decode": lambda: ggml_oracle.dequantize(kind, raw, out=others),
    }
    return row | rates(works | gguf_works("decode", name, values, raw), gigabytes)


def rates(works: Mapping[str, Work], gigabytes: float) -> dict[str, float]:
    """Million elements a second of each, and gigabytes a second of the first."""
    best = race(works)
    ours = next(iter(best))
    found = {name: N / seconds / 1e6 for name, seconds in best.items()}
    return found | {f"{ours}_gb": gigabytes / best[ours]}


def gguf_works(
    direction: str, name: str, values: NDArray[np.float32], raw: NDArray[np.uint8]
) -> dict[str, Work]:
    """What gguf-py does in NumPy, where it can; of F32 it gives the very array."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = getattr(GGMLQuantizationType, name, None)
    rows = raw.reshape(N_ROWS, -1)
    works: dict[str, Work] = {
        "encode": lambda: quantize(values, kind),
        "decode": lambda: dequantize(rows, kind),
    }
    if name == "F32":
        return {}
    try:
        works[direction]()
    except (AttributeError, NotImplementedError):
        return {}
    return {f"gguf_{direction}": works[direction]}


# -- merges


def merge_works() -> dict[str, tuple[Work, int]]:
    """What merges call most, and the bytes that it reads and writes."""
    calls = merge_calls(N_ROWS, N_COLS)
    works: dict[str, tuple[Work, int]] = {
        name: (partial(load_kernel(*name.split(".")), *call.arguments), call.n_bytes)
        for name, call in calls.items()
    }
    dropping = "della.drop_by_rank"
    drop, n_bytes = works[dropping]
    z = calls[dropping].arguments[-1]
    source = z.copy()

    def drop_by_rank() -> None:
        np.copyto(z, source)
        drop()

    works[dropping] = (drop_by_rank, n_bytes + 2 * z.nbytes)
    return works


def merge_figures() -> list[Row]:
    """Time memcpy and the kernels of merges."""
    source = np.random.default_rng(2).standard_normal(N).astype(np.float32)
    target = np.empty_like(source)
    works = merge_works()
    works["memcpy"] = (lambda: np.copyto(target, source), 2 * source.nbytes)
    best = race({name: work for name, (work, _) in works.items()})
    memcpy = works["memcpy"][1] / best["memcpy"]
    return [
        {
            "kernel": name,
            "rate": N / best[name] / 1e6,
            "gb": n_bytes / best[name] / 1e9,
            "of_memcpy": n_bytes / best[name] / memcpy,
        }
        for name, (_, n_bytes) in works.items()
    ]


# -- table and chart


def render(codecs: list[Row], merges: list[Row]) -> str:
    """Return the Markdown tables of SPEED.md."""
    rows = []
    for row in codecs:
        cells = [str(row["type"])]
        for way in ("encode", "decode"):
            if way not in row:
                cells += [""] * 5
                continue
            cells += [f"{row[way]:.0f}", f"{row[f'{way}_gb']:.1f}", f"{row[f'ggml_{way}']:.0f}"]
            cells += [f"{row[f'gguf_{way}']:.0f}" if f"gguf_{way}" in row else ""]
            cells += [f"{ratio(row, way):.1f}x"]
        rows.append(cells)
    sides = ["GB/s", "ggml", "gguf-py", "to ggml"]
    head = ["type", "encode", *sides, "decode", *sides]
    lines = [
        [str(row["kernel"]), f"{row['rate']:.0f}", f"{row['gb']:.1f}", f"{row['of_memcpy']:.0%}"]
        for row in merges
    ]
    merge_head = [f"merging {N_MODELS} models", "M elements/s", "GB/s", "of memcpy"]
    return f"{table(head, rows)}\n\n{table(merge_head, lines)}"


def ratio(row: Row, way: str) -> float:
    """How many times as fast as ggml."""
    return float(row[way]) / float(row[f"ggml_{way}"])


def draw(codecs: list[Row], merges: list[Row], path: Path) -> None:
    """Draw both tables: ratios to ggml on a logarithmic axis from one, and bytes beside memcpy's."""
    heights = [len(codecs), len(merges) * 0.8]
    size = (8, 0.3 * sum(heights) + 1.4)
    figure, axes = new_figure(size, 2, 1, gridspec_kw={"height_ratios": heights})
    above, below = axes[0][0], axes[1][0]
    for i, way in enumerate(("decode", "encode")):
        rows = [(at, ratio(row, way)) for at, row in enumerate(codecs) if way in row]
        places = [at + (i - 0.5) * 0.4 for at, _ in rows]
        values = [value for _, value in rows]
        bars = above.barh(
            places, [v - 1 for v in values], 0.36, left=1, color=COLOURS[i], label=way
        )
        for bar, value in zip(bars, values, strict=True):
            above.annotate(
                f"{value:.1f}",
                (max(value, 1), bar.get_y() + bar.get_height() / 2),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=INK,
            )
    above.axvline(1, color=SOFT, linewidth=1)
    above.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    above.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    above.set_xticks([], minor=True)
    above.set_xlim(0.6, 60)
    above.set_yticks(range(len(codecs)), [str(row["type"]) for row in codecs], color=INK)
    above.set_title("Codecs: times as fast as ggml's C on one core")
    above.legend(loc="lower right", frameon=False)
    values = [float(row["gb"]) for row in merges]
    bars = below.barh(range(len(merges)), values, 0.7, color=COLOURS[2])
    below.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=7, color=INK)
    below.axvline(values[-1], color=SOFT, linewidth=1)
    below.set_xlim(right=1.1 * max(values))
    below.set_yticks(range(len(merges)), [str(row["kernel"]) for row in merges], color=INK)
    below.set_title(
        f"Kernels of merges, {N_MODELS} models: GB/s read and written; the line is memcpy"
    )
    for panel in (above, below):
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
        panel.margins(y=0.015)
        panel.invert_yaxis()
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="these codecs only; draws nothing")
    parser.add_argument("--codecs-only", action="store_true", help="no kernels of merges, no chart")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    np.seterr(all="ignore")  # gguf-py, of the infinite scales that random bytes have
    names = options.types.split(",") if options.types else list(CODECS)
    codecs = [codec_figures(name, CODECS[name]) for name in names]
    merges = [] if options.codecs_only else merge_figures()
    if not options.types and merges:
        draw(codecs, merges, options.figure)
    print(render(codecs, merges))
    rows = {"codecs": codecs, "merges": merges}
    print(json.dumps({"bench": "kernels", "machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
