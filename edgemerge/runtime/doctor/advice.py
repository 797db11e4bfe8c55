"""What to do with a board: which models, which settings, and what holds it back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from edgemerge.budget import FLOOR_BYTES, MIB
from edgemerge.runtime.board.device import Board, Memory, Swap, Throttling
from edgemerge.runtime.board.storage import Storage
from edgemerge.runtime.doctor.build import LlamaBuild, missing_features
from edgemerge.runtime.doctor.fit import Fit
from edgemerge.runtime.engine.options import CHUNK
from edgemerge.runtime.serve.models import DEFAULT_CONTEXT, DEFAULT_SEQUENCES
from edgemerge.runtime.thread_counts import ThreadCounts
from edgemerge.sizes import format_size

__all__ = ["advise", "merge_budget", "warn_of_board", "warn_of_llama"]

_HOT = 80.0  # degrees C: a Raspberry Pi slows down from here on, a Jetson a little later
_SMALL_MEMORY = 8 << 30  # bytes: above it, few merges and models come near the end of memory
_SLOW_READ = 50e6  # bytes per second: an SD card in a Raspberry Pi 4 reads about 40 MB/s
_BUDGET_STEP = 64 * MIB
_MOST_BUDGET = 4096 * MIB  # larger blocks gain nothing in models that fit a board
_LEAST_BLOCKS = 60 * MIB  # of blocks, with which most merges work


def merge_budget(memory: Memory) -> int | None:
    """Budget to merge with: half of the memory available, at least what a merge needs, in bytes.

    None where not even that is free (`edgemerge.budget.FLOOR_BYTES` and some blocks).
    """
    least = -(-(FLOOR_BYTES + _LEAST_BLOCKS) // _BUDGET_STEP) * _BUDGET_STEP
    if memory.available < least:
        return None
    half = memory.available // 2 // _BUDGET_STEP * _BUDGET_STEP
    return min(max(half, least), _MOST_BUDGET)


def advise(memory: Memory, fits: Sequence[Fit], counts: ThreadCounts | None) -> Iterator[str]:
    """Say which models to run, and the settings of running and merging."""
    largest = {fit.file_type: fit for fit in fits if fit.verdict == "fits"}  # smallest model first
    if largest:
        shown = [
            f"{fit.model} in {file_type} ({format_size(fit.bytes)})"
            for file_type, fit in largest.items()
        ]
        yield f"the largest models that fit: {', '.join(shown)}"
        yield "what fits may still be slow: each token reads all weights, so take the smallest that serves"
    else:
        yield "no model of the table fits: stop other programs, or run with less context (-c 512)"
    if counts is None:
        yield (
            "threads are measured when a model is first loaded; "
            "edgemerge doctor --model MODEL.gguf does it now"
        )
    else:
        yield (
            f"answers are fastest with {_threads(counts.generate)} and prompts with "
            f"{_threads(counts.prompt)}, as measured here: these are the defaults, -t N sets both"
        )
    yield (
        f"serve answers {DEFAULT_SEQUENCES} requests at a time (--parallel), each with up to "
        f"{DEFAULT_CONTEXT} tokens (--ctx); together they keep half as many, since most are shorter, "
        "and fewer where memory is short"
    )
    yield (
        f"serve reads prompts {CHUNK} tokens at a time: answers beside them wait no longer, and smaller "
        "parts were not faster where they were tried"
    )
    budget = merge_budget(memory)
    if budget is None:
        yield (
            f"a merge needs about {format_size(FLOOR_BYTES + _LEAST_BLOCKS)} and "
            f"{format_size(memory.available)} are free: stop other programs first"
        )
    else:
        yield f"merge with --memory {budget // MIB}MiB at most"


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n != 1)}"


def warn_of_board(
    board: Board,
    swaps: Sequence[Swap],
    storage: Storage,
    temperature: float | None,
    throttling: Throttling | None,
) -> Iterator[str]:
    """Say what of the board and its system is in the way, and what helps."""
    if sys.maxsize < 2**32:
        yield "this is a 32-bit system: a 64-bit one runs models several times faster"
    if throttling is not None:
        yield from _warn_of_throttling(throttling)
    if temperature is not None and temperature >= _HOT:
        yield f"the processor is at {temperature:.0f} °C: give it a heat sink or a fan"
    if board.keeps_clock_low:
        yield (
            "the clock stays at its lowest (governor powersave): echo ondemand | sudo tee "
            "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    if any(swap.kind == "SD card" for swap in swaps):
        yield "swap lies on an SD card, which is slow and wears out: use zram (apt install zram-tools)"
    if not swaps and board.memory.total < _SMALL_MEMORY:
        yield (
            "there is no swap: where memory ends, a program is killed; "
            "zram gives some room (apt install zram-tools)"
        )
    if storage.read_rate is not None and storage.read_rate < _SLOW_READ:
        yield (
            f"reading {storage.folder} is slow: a model of 1 GiB takes "
            f"{2**30 / storage.read_rate:.0f} s to load; a USB 3 or NVMe SSD is faster"
        )


def _warn_of_throttling(throttling: Throttling) -> Iterator[str]:
    power = "the power supply or its cable is too weak; use the one made for this board"
    if "under-voltage" in throttling.reasons:
        yield f"the voltage is too low: {power}"
    elif any("under-voltage" in event for event in throttling.since_boot):
        yield f"the voltage has been too low since boot: {power}"
    limits = [reason for reason in throttling.reasons if reason.startswith("clock limited")]
    for limit in limits:
        yield f"{limit}: choose a faster power mode (on a Jetson, sudo nvpmodel -p --verbose lists them)"
    heat = [reason for reason in throttling.reasons if reason not in ("under-voltage", *limits)]
    if "under-voltage" in throttling.reasons:
        # then it is for the voltage that a Raspberry Pi's firmware slows down
        heat = [reason for reason in heat if reason not in ("clock capped", "throttled")]
    if heat:
        yield f"slowed down now ({', '.join(heat)}): cool the board; measure again when it is cold"


def warn_of_llama(board: Board, build: LlamaBuild) -> Iterator[str]:
    """Say what llama.cpp was built without that this board has, and how to build it again."""
    faults = []
    options = []
    missing = missing_features(build.features, board.cpu_features)
    if missing:
        faults.append(f"without {', '.join(missing)}, which this processor has")
        options.append("-DGGML_NATIVE=ON")
    if any("NVIDIA" in name for name in board.accelerators) and not build.can_offload:
        faults.append("without CUDA, which leaves the NVIDIA GPU idle")
        options.append("-DGGML_CUDA=ON")
    if build.is_debug:
        faults.append("for debugging, which makes it several times slower")
    if faults:
        setting = f"CMAKE_ARGS='{' '.join(options)}' " if options else ""
        yield (
            f"llama.cpp is built {', and '.join(faults)}; build it again: {setting}pip install --no-deps "
            "--force-reinstall --no-cache-dir --no-binary llama-cpp-python "
            f"llama-cpp-python=={build.version}"
        )
