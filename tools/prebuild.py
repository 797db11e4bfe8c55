#!/usr/bin/env python3
"""Compile all kernels for every processor that a wheel is for, into edgemerge/native/prebuilt.

    python -m tools.prebuild [MACHINE[/VARIANT] ...]       x86_64 and aarch64 unless said
    python -m tools.prebuild native                        for this processor alone
    python -m tools.prebuild --into FOLDER aarch64/armv8.0

`edgemerge/native/processors.py` lists the variants of each. A wheel with these images compiles nothing where
it is installed; a processor older than all of them compiles for itself. What was compiled once is kept in
$EDGEMERGE_PREBUILT (default ~/.cache/edgemerge/prebuilt).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from pathlib import Path

from edgemerge.native.names import image_name
from edgemerge.native.processors import VARIANTS, Variant, fitting_variants, processor_features
from edgemerge.native.signatures import KERNEL_NAMES
from edgemerge.native.store import PREBUILT, slow_first
from tools.foreign_numba import compile_for

USER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
KEPT = Path(os.environ.get("EDGEMERGE_PREBUILT") or USER / "edgemerge" / "prebuilt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wanted", nargs="*", metavar="MACHINE[/VARIANT]")
    parser.add_argument("--into", type=Path, default=PREBUILT, metavar="FOLDER")
    options = parser.parse_args()
    for machine, variants in wanted_variants(options.wanted).items():
        shutil.rmtree(options.into / machine, ignore_errors=True)
        for variant in variants:
            copy_images(machine, variant, options.into / machine / variant.name)


def wanted_variants(wanted: list[str]) -> dict[str, list[Variant]]:
    """List the variants of each machine that the command line names."""
    found: dict[str, list[Variant]] = {}
    for word in wanted or VARIANTS:
        if word == "native":
            machine = platform.machine()
            variants = fitting_variants(machine, processor_features())[:1]
        else:
            machine, _, name = word.partition("/")
            variants = [v for v in VARIANTS.get(machine, ()) if name in ("", v.name)]
        if not variants:
            known = [f"{machine}/{v.name}" for machine, all_ in VARIANTS.items() for v in all_]
            raise SystemExit(f"tools.prebuild: {word} is none of native, {', '.join(known)}")
        found.setdefault(machine, []).extend(variants)
    return found


def copy_images(machine: str, variant: Variant, folder: Path) -> None:
    """Put all kernels' images into a folder, after those that are not kept yet were compiled."""
    versions = f"numba-{version('numba')}-llvmlite-{version('llvmlite')}"
    kept = KEPT / f"{versions}-{machine}-{variant.cpu}{variant.options}"
    kept.mkdir(parents=True, exist_ok=True)
    images = {name: image_name(*name.split(".")) for name in KERNEL_NAMES}
    missing = [name for name, image in images.items() if not (kept / image).exists()]
    started = time.monotonic()
    compile_images(machine, variant, kept, missing)
    took = time.monotonic() - started
    folder.mkdir(parents=True)
    for image in images.values():
        shutil.copy(kept / image, folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) >> 10
    done = f"{len(missing)} compiled in {took:.0f} s"
    print(f"{variant.name}: {len(images)} kernels, {size} KiB, {done}", flush=True)


def compile_images(machine: str, variant: Variant, folder: Path, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        # Numba reads these when it is first imported, which is in the workers.
        os.environ |= {
            "NUMBA_CPU_NAME": variant.cpu,
            "NUMBA_CPU_FEATURES": variant.options,
            "NUMBA_CACHE_DIR": cache,
        }
        # Not a Pool, which waits for ever for a child that was killed, as where memory ends.
        try:
            with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
                list(pool.map(partial(_compile, machine, variant, folder), slow_first(names)))
        except BrokenProcessPool as error:
            raise SystemExit(
                "tools.prebuild: a child that compiles was killed, which the system does where memory ends"
            ) from error


def _compile(machine: str, variant: Variant, folder: Path, full_name: str) -> None:
    if machine != platform.machine():
        compile_for(machine)
    from edgemerge.native.compiler import check_numba, compile_image

    if variant in fitting_variants(platform.machine(), processor_features()):
        check_numba()  # runs what it compiles
    file, name = full_name.split(".")
    part = folder / f"{full_name}.{os.getpid()}.part"
    part.write_bytes(compile_image(file, name).to_bytes())
    part.rename(folder / image_name(file, name))


if __name__ == "__main__":
    main()
