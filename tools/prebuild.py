#!/usr/bin/env python3
"""Compile all kernels for every processor that a wheel is for, into edgemerge/native/prebuilt.

    python -m tools.prebuild        for this machine's kind: x86-64-v3 or any AArch64
    tools/arm64 --prebuild          for AArch64, on an emulated one

`make wheel` does both. A wheel with these images compiles nothing where it is installed; a processor older
than x86-64-v3 (AVX2, 2013) compiles for itself as before.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import tempfile
import time

from edgemerge.native.signatures import KERNEL_NAMES
from edgemerge.native.store import PREBUILT, slow_first

PROCESSORS = {"x86_64": ("x86-64-v3", "+pclmul"), "aarch64": ("generic", "")}


def main() -> None:
    machine = platform.machine()
    processor, features = PROCESSORS[machine]
    folder = PREBUILT / machine
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        # Numba reads these when it is first imported, which is in the workers.
        os.environ |= {
            "NUMBA_CPU_NAME": processor,
            "NUMBA_CPU_FEATURES": features,
            "NUMBA_CACHE_DIR": cache,
        }
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.map(_compile, slow_first(KERNEL_NAMES), chunksize=1)
    size = sum(path.stat().st_size for path in folder.iterdir())
    took = time.monotonic() - started
    print(f"{machine}: {len(KERNEL_NAMES)} kernels for {processor}, {size >> 10} KiB, {took:.0f} s")


def _compile(name: str) -> None:
    from edgemerge.native.compiler import main as compile_into

    compile_into(PREBUILT / platform.machine(), [name])


if __name__ == "__main__":
    main()
