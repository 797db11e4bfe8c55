"""Compile kernels for an AArch64 processor on any machine: the images that the processor would make itself.

    benchmarks/arm_compiler.py FOLDER PROCESSOR FILE.KERNEL ...

The images are those of a board, byte for byte, but for the path of Numba in the texts of errors that kernels
never raise (tools/foreign_numba.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import ROOT

from edgemerge.native.image import Image
from edgemerge.native.names import image_name

sys.path.insert(0, str(ROOT))
from tools.foreign_numba import compile_for

GENERIC = "generic"  # what wheels bring images for (tools/prebuild.py)


def images(folder: Path, processor: str, names: Sequence[str]) -> dict[str, Image]:
    """Return kernels (FILE.KERNEL) compiled for a processor, as LLVM names it; `folder` keeps them."""
    target = folder / processor
    target.mkdir(parents=True, exist_ok=True)
    paths = {name: target / image_name(*name.split(".")) for name in names}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        command = [sys.executable, __file__, str(target), processor, *missing]
        # Numba reads both when it is first imported.
        features = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
        subprocess.run(command, env={**os.environ, **features}, check=True)
    return {name: Image.from_bytes(path.read_bytes()) for name, path in paths.items()}


def main(folder: Path, names: Sequence[str]) -> None:
    """Compile into a folder, in a process of its own: Numba stays changed."""
    compile_for("aarch64")
    from edgemerge.native.compiler import compile_image

    for full_name in names:
        file, name = full_name.split(".")
        (folder / image_name(file, name)).write_bytes(compile_image(file, name).to_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
