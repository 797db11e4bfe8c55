"""Cycles of executed instructions on an AArch64 processor, as llvm-mca predicts them.

llvm-mca knows of every instruction how long it takes and which units it needs, and simulates a processor
that waits for nothing else: every load finds its line in the first cache, and every branch is foreseen.
What is simulated are windows of what an emulator executed, evenly spaced from the first to the last
instruction, so that each loop has the weight that it has.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from arm_emulator import Emulator, Execution

WINDOWS, WINDOW = (
    128,
    300,
)  # how many, and their instructions: with 16 a prediction varied by a third
NEWEST, OLDEST = 22, 16  # versions of LLVM; the first that has a model of Neoverse N1
BUSY = 0.85  # of a unit's cycles; less is put down to waiting for results

WRITING_BACK = re.compile(
    r"^(?P<what>st\S*\s.*)\[(?P<register>\w+)(?:\], (?P<after>#-?\d+)|, (?P<before>#-?\d+)\]!)$"
)

# Units of LLVM's models, by the letter after "Unit", in words.
UNITS = {"V": "vector", "W": "vector", "X": "vector", "L": "load and store", "S": "integer"}
UNITS |= {"I": "integer", "M": "integer", "D": "store", "B": "branch"}


@dataclass(frozen=True)
class Processor:
    """A processor, and what stands for it where LLVM has no model of its own."""

    name: str  # as gcc and LLVM name it
    board: str
    model: str  # the processor whose model llvm-mca uses
    decodes: int  # instructions a cycle, which llvm-mca does not know


PROCESSORS = (
    Processor("cortex-a72", "Raspberry Pi 4", "cortex-a72", 3),
    Processor("cortex-a76", "Raspberry Pi 5", "neoverse-n1", 4),
    Processor("cortex-a78ae", "Jetson Orin", "neoverse-n2", 4),
)


@dataclass(frozen=True)
class Prediction:
    """What llvm-mca says of a sample."""

    cycles: float  # per instruction
    bottleneck: str


def predict(emulator: Emulator, execution: Execution, processor: Processor) -> Prediction:
    """Predict the cycles of an execution, from a sample of its instructions."""
    words = sample(emulator, execution)
    text = "\n".join(WRITING_BACK.sub(_split, line) for line in disassemble(words))
    command = [
        tool("llvm-mca"),
        "-mtriple=aarch64",
        f"-mcpu={processor.model}",
        "-iterations=1",
        "-json",
    ]
    found = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    result = json.loads(found.stdout)
    region = result["CodeRegions"][0]
    total = region["SummaryView"]["TotalCycles"]
    usage: dict[str, list[float]] = defaultdict(list)
    pressure = region["ResourcePressureView"]["ResourcePressureInfo"]
    of_all = {
        info["ResourceIndex"]: info["ResourceUsage"]
        for info in pressure
        if info["InstructionIndex"] == len(region["Instructions"])
    }
    for index, name in enumerate(result["TargetInfo"]["Resources"]):
        usage[name.partition("Unit")[2]].append(of_all.get(index, 0.0))
    cycles = max(total, len(words) / processor.decodes)
    return Prediction(cycles / len(words), _bottleneck(usage, cycles, len(words), processor))


def _split(store: re.Match[str]) -> str:
    """Make two instructions of a store that also moves its address, as processors do.

    llvm-mca would let the new address wait for what is stored.
    """
    what, register, offset, after = store.group("what", "register", "before", "after")
    place = f"[{register}]" if after else f"[{register}, {offset}]"
    return f"{what}{place}\nadd {register}, {register}, {after or offset}"


def _bottleneck(
    usage: dict[str, list[float]], cycles: float, n_instructions: int, processor: Processor
) -> str:
    """What limits: the busiest kind of unit, decoding, or waiting for results."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, busy in usage.items():
        kinds[UNITS[name[0]]].extend(busy)
    kind, share = max(
        ((kind, sum(busy) / len(busy) / cycles) for kind, busy in kinds.items()), key=lambda x: x[1]
    )
    decoding = n_instructions / processor.decodes / cycles
    if decoding > max(share, BUSY):
        return f"decode {decoding:.0%}"
    return f"{kind} {share:.0%}" if share > BUSY else f"waits; {kind} {share:.0%}"


def sample(emulator: Emulator, execution: Execution) -> list[bytes]:
    """Return instructions, four bytes each, of windows evenly spaced over an execution."""
    ends = np.cumsum(execution.n_instructions, dtype=np.int64)
    words: list[bytes] = []
    for start in np.linspace(0, max(0, ends[-1] - WINDOW), WINDOWS).astype(np.int64):
        piece = int(np.searchsorted(ends, start, side="right"))
        n_left = WINDOW
        while n_left > 0 and piece < ends.size:
            n_bytes = 4 * min(n_left, int(execution.n_instructions[piece]))
            code = emulator.read(int(execution.starts[piece]), n_bytes)
            words += [code[i : i + 4] for i in range(0, n_bytes, 4)]
            n_left -= n_bytes // 4
            piece += 1
    return words


def disassemble(words: Sequence[bytes]) -> list[str]:
    """Return the text of each instruction."""
    distinct = list(dict.fromkeys(words))
    text = "\n".join(" ".join(f"0x{byte:02x}" for byte in word) for word in distinct)
    command = [tool("llvm-mc"), "-triple=aarch64", "-mattr=+all", "-disassemble"]
    found = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    lines = [line.strip() for line in found.stdout.splitlines() if line.startswith("\t")]
    lines = [line for line in lines if not line.startswith(".")]
    assert len(lines) == len(distinct), found.stderr
    meaning = dict(zip(distinct, lines, strict=True))
    return [meaning[word] for word in words]


@cache
def tool(name: str) -> str:
    """Return the newest of a program of LLVM."""
    for version in range(NEWEST, OLDEST - 1, -1):
        if path := shutil.which(f"{name}-{version}"):
            return path
    raise SystemExit(f"{name} of LLVM {OLDEST} or later is needed (Debian: apt install llvm-19)")
