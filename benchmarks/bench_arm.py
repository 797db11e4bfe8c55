"""Codecs and merges on Arm, by count and by model: instructions and predicted cycles of one element.

    benchmarks/bench_arm.py [--only Q4_K,dare.drop_random]

No board is measured. Instructions are those that an emulator executes (arm_emulator.py), of images
compiled for the processor (arm_compiler.py) and of ggml's C, compiled by gcc (make-ggml-arm). Cycles are what
llvm-mca predicts of them (arm_prediction.py). Every function is called with some rows and with twice as many;
the difference counts, so what is done once a call does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arm_compiler import GENERIC, images
from arm_emulator import Emulator, Execution
from arm_prediction import PROCESSORS, Prediction, Processor, predict
from measure import CACHE, machine, run, table
from merge_calls import N_MODELS, merge_calls

from edgemerge.formats.quants.codec import CODECS

TYPES = ("Q4_K", "Q6_K", "Q8_0", "F16", "BF16")
N_ROWS, N_COLS = 2, 2048
MAIN = "cortex-a76"  # whose counts are shown
BYTES_OF_VECTOR = 16
FOLDER = CACHE / "arm"

Row = dict[str, float | str]
Arguments = Callable[[int], list[Any]]  # of a call for a number of rows


@dataclass(frozen=True)
class Case:
    """A function of ours, and what ggml has for it."""

    name: str
    kernel: str  # FILE.KERNEL
    arguments: Arguments
    ggml: tuple[tuple[str, Arguments], ...] = ()  # functions, which are called in turn
    n_bytes: float = 0  # of an element, read and written


@dataclass(frozen=True)
class Figures:
    """What one element takes."""

    instructions: float
    prediction: Prediction

    @property
    def cycles(self) -> float:
        """Predicted."""
        return self.instructions * self.prediction.cycles


# -- what is called


def codec_cases() -> list[Case]:
    """Both directions of the types that merges read and write most."""
    return [case for dtype in TYPES for case in (encoding(dtype), decoding(dtype))]


def encoding(dtype: str) -> Case:
    """Rows of normal numbers to blocks."""
    codec = CODECS[dtype]

    def ours(n_rows: int) -> list[Any]:
        scratch = [np.zeros(codec.scratch_len, np.float32)] if codec.scratch_len else []
        return [values(n_rows), *scratch, blocks(dtype, n_rows)]

    def theirs(n_rows: int) -> list[Any]:
        return [values(n_rows), blocks(dtype, n_rows), n_rows * N_COLS]

    halves = {"F16": "ggml_fp32_to_fp16_row", "BF16": "ggml_fp32_to_bf16_row"}
    function = halves.get(dtype, f"quantize_row_{dtype.replace('Q8', 'q8').replace('Q', 'q')}_ref")
    kernel = f"{codec.kernels}.encode_{dtype.lower()}"
    return Case(f"encode {dtype}", kernel, ours, ((function, theirs),))


def decoding(dtype: str) -> Case:
    """The blocks of such rows back to numbers."""
    codec = CODECS[dtype]

    def ours(n_rows: int) -> list[Any]:
        raw = blocks(dtype, n_rows)
        codec.encode(values(n_rows), raw.view(np.uint8), np.zeros(codec.scratch_len, np.float32))
        return [raw, values(n_rows)]

    def theirs(n_rows: int) -> list[Any]:
        return [*ours(n_rows), n_rows * N_COLS]

    halves = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}
    function = halves.get(dtype, f"dequantize_row_{dtype.replace('Q', 'q')}")
    kernel = f"{codec.kernels}.decode_{dtype.lower()}"
    return Case(f"decode {dtype}", kernel, ours, ((function, theirs),))


def values(n_rows: int) -> Any:
    """Return normal numbers."""
    return np.random.default_rng(0).standard_normal(n_rows * N_COLS).astype(np.float32)


def blocks(dtype: str, n_rows: int) -> Any:
    """Return room for the stored side."""
    codec = CODECS[dtype]
    n_bytes = n_rows * N_COLS // codec.block_len * codec.block_bytes
    return np.zeros(n_bytes, np.uint8).view(np.uint8 if codec.block_len > 1 else np.uint16)


def merge_cases() -> list[Case]:
    """Kernels of merges, and ggml's vector functions where these do the same."""

    def arguments(name: str) -> Arguments:
        return lambda n_rows: merge_calls(n_rows, N_COLS)[name].arguments

    def scale(n_rows: int) -> list[Any]:
        return [n_rows * N_COLS, values(n_rows), np.float32(0.5)]

    def mad(n_rows: int) -> list[Any]:
        return [n_rows * N_COLS, values(n_rows), values(n_rows), np.float32(0.5)]

    def sub(n_rows: int) -> list[Any]:
        return [n_rows * N_COLS, values(n_rows), values(n_rows), values(n_rows)]

    def copy(n_rows: int) -> list[Any]:
        return [values(n_rows), values(n_rows), 4 * n_rows * N_COLS]

    scaling, adding, taking = (
        ("ggml_vec_scale", scale),
        ("ggml_vec_mad", mad),
        ("ggml_vec_sub", sub),
    )
    theirs: Mapping[str, tuple[tuple[str, Arguments], ...]] = {
        "linear.weighted_sum": (scaling, *[adding] * (N_MODELS - 1)),
        "linear.subtract": (taking,),
        "linear.add_scaled": (adding,),
        "linear.add_changes": (*[taking] * N_MODELS, scaling, *[adding] * N_MODELS),
        "linear.add_deltas": (scaling, *[adding] * N_MODELS),
    }
    calls = merge_calls(1, N_COLS)
    cases = [
        Case(name, name, arguments(name), theirs.get(name, ()), call.n_bytes / N_COLS)
        for name, call in calls.items()
    ]
    return [*cases, Case("memcpy", "", copy, (("memcpy", copy),), 8)]


# -- figures


class Bench:
    """Emulators with ggml's functions and the C library's, one for each processor."""

    def __init__(self, kernels: Sequence[str]) -> None:
        names = [processor.name for processor in PROCESSORS]
        script = Path(__file__).with_name("make-ggml-arm")
        run([script, FOLDER, sys.executable, *names], shows_progress=True)
        self._images = {name: images(FOLDER, name, kernels) for name in (*names, GENERIC)}
        self._emulators = {name: Emulator() for name in names}
        for name, emulator in self._emulators.items():
            emulator.load_program(FOLDER / f"ggml-{name}")

    def ours(self, case: Case, processor: Processor) -> Figures:
        """Count and predict a kernel."""
        instructions, execution = self._count(case, processor.name, processor.name)
        emulator = self._emulators[processor.name]
        return Figures(instructions, predict(emulator, execution, processor))

    def of_wheel(self, case: Case) -> float:
        """Count the instructions of a wheel's image."""
        return self._count(case, MAIN, GENERIC)[0]

    def ggml(self, function: str, arguments: Arguments, processor: Processor) -> Figures:
        """Count and predict a function of ggml or of the C library."""
        emulator = self._emulators[processor.name]
        address = emulator.symbols[function]
        instructions, execution = count(lambda n_rows: emulator.call(address, arguments(n_rows)))
        return Figures(instructions, predict(emulator, execution, processor))

    def _count(self, case: Case, runs_on: str, compiled_for: str) -> tuple[float, Execution]:
        emulator = self._emulators[runs_on]
        address = emulator.place(self._images[compiled_for][case.kernel])
        return count(
            lambda n_rows: emulator.call_kernel(case.kernel, address, case.arguments(n_rows))
        )


def count(call: Callable[[int], Execution]) -> tuple[float, Execution]:
    """Return the instructions of an element, and the longer of the two executions."""
    once, twice = call(N_ROWS), call(2 * N_ROWS)
    return (twice.total - once.total) / (N_ROWS * N_COLS), twice


def figures(bench: Bench, case: Case) -> Row:
    """Return all that the tables show of a case."""
    row: Row = {"name": case.name, "n_bytes": case.n_bytes}
    for processor in PROCESSORS:
        found = [bench.ggml(*function, processor) for function in case.ggml]
        sides = {"ggml": found} if found else {}
        if case.kernel:
            sides["ours"] = [bench.ours(case, processor)]
        for side, of_side in sides.items():
            about = f"{side} {processor.name}"
            row[f"{about} instructions"] = sum(figure.instructions for figure in of_side)
            row[f"{about} cycles"] = sum(figure.cycles for figure in of_side)
            row[f"{about} limit"] = of_side[0].prediction.bottleneck
    if case.kernel:
        row["wheel"] = bench.of_wheel(case)
    return row


# -- tables


def render_codecs(rows: Sequence[Row]) -> str:
    """Ours beside ggml's."""
    head = ["one element, instructions", "ours", "ggml", "ggml / ours", "ours, a wheel's"]
    head += [f"cycles {p.board}: ours, ggml" for p in PROCESSORS]
    lines = []
    for row in rows:
        ours, ggml = (float(row[f"{side} {MAIN} instructions"]) for side in ("ours", "ggml"))
        cells = [str(row["name"]), *map(short, (ours, ggml)), f"{ggml / ours:.1f}x"]
        cells.append(short(row["wheel"]))
        for processor in PROCESSORS:
            cycles = [row[f"{side} {processor.name} cycles"] for side in ("ours", "ggml")]
            cells.append(", ".join(map(short, cycles)))
        lines.append([*cells, str(row[f"ours {MAIN} limit"])])
    return table([*head, "what limits, Pi 5"], lines)


def render_merges(rows: Sequence[Row]) -> str:
    """Kernels of merges beside memcpy and ggml's vector functions."""
    head = [f"merging {N_MODELS} models, one element", "bytes", "instructions", "of 16 bytes"]
    head += ["ggml's", "ours, a wheel's", *(f"cycles {p.board}" for p in PROCESSORS)]
    lines = []
    for row in rows:
        side = "ours" if "wheel" in row else "ggml"
        n_bytes, instructions = float(row["n_bytes"]), float(row[f"{side} {MAIN} instructions"])
        cells = [str(row["name"]), f"{n_bytes:.0f}", short(instructions)]
        cells.append(short(instructions / n_bytes * BYTES_OF_VECTOR))
        of_ggml = row.get(f"ggml {MAIN} instructions", "") if side == "ours" else ""
        cells += [
            short(figure) if figure != "" else "" for figure in (of_ggml, row.get("wheel", ""))
        ]
        cells += [short(row[f"{side} {p.name} cycles"]) for p in PROCESSORS]
        lines.append([*cells, str(row[f"{side} {MAIN} limit"])])
    return table([*head, "what limits, Pi 5"], lines)


def short(figure: float | str) -> str:
    """Three digits."""
    return f"{float(figure):.{2 if float(figure) < 10 else 1 if float(figure) < 100 else 0}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="these types and kernels")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else None
    codecs, merges = (
        [case for case in cases if wanted is None or case.name.split()[-1] in wanted]
        for cases in (codec_cases(), merge_cases())
    )
    bench = Bench([case.kernel for case in (*codecs, *merges) if case.kernel])
    rows = []
    for case in (*codecs, *merges):
        print(case.name, file=sys.stderr)
        rows.append(figures(bench, case))
    of_codecs, of_merges = rows[: len(codecs)], rows[len(codecs) :]
    print("\n\n".join(part for part in (render_codecs(of_codecs), render_merges(of_merges))))
    print(json.dumps({"bench": "arm", "machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
