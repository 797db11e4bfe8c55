#!/usr/bin/env python3
"""Compile all kernels for every processor that a wheel is for, into edgemerge/native/prebuilt.

    python -m tools.prebuild [VARIANT ...]    for this machine's kind: x86-64 or AArch64
    tools/arm64 --prebuild                    for AArch64, on an emulated one

`make wheel` does both. `edgemerge/native/processors.py` lists the variants; without names all are compiled.
A wheel with these images compiles nothing where it is installed; a processor older than all of them compiles
for itself. What was compiled once is kept in $EDGEMERGE_PREBUILT (default ~/.cache/edgemerge/prebuilt), as
emulation is slow.
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
from importlib.metadata import version
from pathlib import Path

from edgemerge.native.names import image_name
from edgemerge.native.processors import VARIANTS, Variant, fitting_variants, processor_features
from edgemerge.native.signatures import KERNEL_NAMES
from edgemerge.native.store import PREBUILT, slow_first

USER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
KEPT = Path(os.environ.get("EDGEMERGE_PREBUILT") or USER / "edgemerge" / "prebuilt")


def main(names: list[str]) -> None:
    machine = platform.machine()
    shutil.rmtree(PREBUILT / machine, ignore_errors=True)
    for variant in VARIANTS[machine]:
        if not names or variant.name in names:
            copy_images(variant, PREBUILT / machine / variant.name)


def copy_images(variant: Variant, folder: Path) -> None:
    """Put all kernels' images into a folder, after those that are not kept yet were compiled."""
    versions = f"numba-{version('numba')}-llvmlite-{version('llvmlite')}"
    kept = KEPT / f"{versions}-{variant.cpu}{variant.options}"
    kept.mkdir(parents=True, exist_ok=True)
    images = {name: image_name(*name.split(".")) for name in KERNEL_NAMES}
    missing = [name for name, image in images.items() if not (kept / image).exists()]
    started = time.monotonic()
    compile_images(variant, kept, missing)
    took = time.monotonic() - started
    folder.mkdir(parents=True)
    for image in images.values():
        shutil.copy(kept / image, folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) >> 10
    done = f"{len(missing)} compiled in {took:.0f} s"
    print(f"{variant.name}: {len(images)} kernels, {size} KiB, {done}", flush=True)


def compile_images(variant: Variant, folder: Path, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        # Numba reads these when it is first imported, which is in the workers.
        os.environ |= {
            "NUMBA_CPU_NAME": variant.cpu,
            "NUMBA_CPU_FEATURES": variant.options,
            "NUMBA_CACHE_DIR": cache,
        }
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.map(partial(_compile, variant, folder), slow_first(names), chunksize=1)


def _compile(variant: Variant, folder: Path, full_name: str) -> None:
    from edgemerge.native.compiler import check_numba, compile_image

    if variant in fitting_variants(platform.machine(), processor_features()):
        check_numba()  # runs what it compiles
    file, name = full_name.split(".")
    part = folder / f"{full_name}.{os.getpid()}.part"
    part.write_bytes(compile_image(file, name).to_bytes())
    part.rename(folder / image_name(file, name))


if __name__ == "__main__":
    main(sys.argv[1:])
