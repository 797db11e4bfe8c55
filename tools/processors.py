"""Run the tests of codecs, kernels and methods, and the portable hashes, as if this were an older processor.

    python -m tools.processors [ARGUMENT OF PYTEST ...]

For every level of x86-64 below this processor's own, which `make test` shows: NumPy leaves newer
instructions alone (NPY_DISABLE_CPU_FEATURES), OpenBLAS takes the level's routines, and kernels are compiled
for it (NUMBA_CPU_NAME), into a cache of its own. With qemu-user-static the hashes are also computed on an
emulated processor, which has no newer instructions at all. `make arm64` does the same on Arm.

Exit status: 0 all passed, 1 something failed, 3 nothing could be run here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edgemerge.native.names import KERNELS
from edgemerge.native.signatures import SHARED
from edgemerge.native.store import PREBUILT
from tests.support.processors import LEVELS, disabled_features, levels_here

ROOT = Path(__file__).resolve().parent.parent
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgemerge" / "processors"
)
TESTS: tuple[str, ...] = (
    "tests/kernels",
    "tests/formats/quants/test_codec.py",
    "tests/formats/quants/test_weighted.py",
)
TESTS += ("tests/methods", "tests/test_portable_hashes.py")
HASHES = ("-m", "tests.support.portable_hashes")

# What Numba compiles with besides the level, and OpenBLAS's name of its routines.
FEATURES = {"x86-64-v2": "", "x86-64-v3": "+pclmul", "x86-64-v4": "+pclmul"}
ROUTINES = {"x86-64-v2": "NEHALEM", "x86-64-v3": "HASWELL", "x86-64-v4": "SKYLAKEX"}
# Processors that qemu emulates; it knows no AVX-512.
EMULATED = {"x86-64-v2": "Nehalem", "x86-64-v3": "Haswell"}


@dataclass
class Row:
    """One line of the summary."""

    processor: str
    what: str
    outcome: str


def main(arguments: list[str]) -> int:
    """Run what can be run and print the summary."""
    if PREBUILT.exists():
        print(
            f"processors: {PREBUILT} holds kernels of a wheel, which would be taken; remove it",
            file=sys.stderr,
        )
        return 3
    lower, own = levels_here()[:-1], levels_here()[-1:]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda level: test(level, arguments), lower))
        rows += pool.map(emulate, [level for level in lower if level in EMULATED])
    for level in LEVELS:
        if level in own:
            rows.append(Row(level, "tests", "not run: make test is this level"))
        elif level not in lower:
            rows.append(Row(level, "tests", "not shown: this processor does not have it"))
    print("\n== processors")
    for row in rows:
        print(f"{row.processor:<13} {row.what:<7} {row.outcome}")
    if any(row.outcome.startswith("FAILED") for row in rows):
        return 1
    return 0 if any(row.outcome.startswith("passed") for row in rows) else 3


def test(level: str, arguments: list[str]) -> Row:
    """Run the tests as on a processor of a level."""
    return run(level, "tests", [sys.executable, "-m", "pytest", "-q", *TESTS, *arguments], level)


def emulate(level: str) -> Row:
    """Compute the hashes under qemu, with the kernels that were compiled for the level."""
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    name = f"qemu {EMULATED[level]}"
    if emulator is None:
        return Row(name, "hashes", "not shown: qemu-user-static is not installed")
    return run(name, "hashes", [emulator, "-cpu", EMULATED[level], sys.executable, *HASHES], level)


def run(name: str, what: str, command: list[str], level: str) -> Row:
    """Run one command as on a processor of a level; show what it says where it fails."""
    print(f"== {name}: {what}", flush=True)
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(level), capture_output=True, text=True, check=False
    )
    took = time.monotonic() - started
    if done.returncode:
        print(f"{done.stdout}{done.stderr}== {name}: {what} FAILED", flush=True)
        return Row(name, what, f"FAILED, {took:.0f} s")
    return Row(name, what, f"passed, {took:.0f} s: {done.stdout.strip().splitlines()[-1]}")


def environment(level: str) -> dict[str, str]:
    """What makes NumPy, OpenBLAS and Numba take this machine for one of the level."""
    return {
        **os.environ,
        "NPY_DISABLE_CPU_FEATURES": disabled_features(level),
        "OPENBLAS_CORETYPE": ROUTINES[level],
        "NUMBA_CPU_NAME": level,
        "NUMBA_CPU_FEATURES": FEATURES[level],
        "NUMBA_CACHE_DIR": str(CACHE / f"{level}-{shared_hash()}"),
    }


def shared_hash() -> str:
    """Numba does not see that a file changed which kernels import: it is part of the cache's name."""
    digest = hashlib.sha256(b"".join((KERNELS / f"{file}.py").read_bytes() for file in SHARED))
    return digest.hexdigest()[:8]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
