#!/usr/bin/env python3
"""Compile all kernels for every processor that a wheel is for, into edgemerge/native/prebuilt.

    python -m tools.prebuild [VARIANT ...]    for this machine's kind: x86-64 or AArch64
    tools/arm64 --prebuild                    for AArch64, on an emulated one

`make wheel` does both. `edgemerge/native/processors.py` lists the variants; without names all are compiled.
A wheel with these images compiles nothing where it is installed; a processor older than all of them compiles
for itself.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from edgemerge.native.names import image_name
from edgemerge.native.processors import VARIANTS, Variant, fitting_variants, processor_features
from edgemerge.native.signatures import KERNEL_NAMES
from edgemerge.native.store import PREBUILT, slow_first


def main(names: list[str]) -> None:
    machine = platform.machine()
    shutil.rmtree(PREBUILT / machine, ignore_errors=True)
    for variant in VARIANTS[machine]:
        if not names or variant.name in names:
            compile_variant(variant, PREBUILT / machine / variant.name)


def compile_variant(variant: Variant, folder: Path) -> None:
    folder.mkdir(parents=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        # Numba reads these when it is first imported, which is in the workers.
        os.environ |= {
            "NUMBA_CPU_NAME": variant.cpu,
            "NUMBA_CPU_FEATURES": variant.options,
            "NUMBA_CACHE_DIR": cache,
        }
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.map(partial(_compile, variant, folder), slow_first(KERNEL_NAMES), chunksize=1)
    size = sum(path.stat().st_size for path in folder.iterdir())
    took = time.monotonic() - started
    print(
        f"{variant.name}: {len(KERNEL_NAMES)} kernels, {size >> 10} KiB, {took:.0f} s", flush=True
    )


def _compile(variant: Variant, folder: Path, full_name: str) -> None:
    from edgemerge.native.compiler import check_numba, compile_image

    if variant in fitting_variants(platform.machine(), processor_features()):
        check_numba()  # runs what it compiles
    file, name = full_name.split(".")
    (folder / image_name(file, name)).write_bytes(compile_image(file, name).to_bytes())


if __name__ == "__main__":
    main(sys.argv[1:])
