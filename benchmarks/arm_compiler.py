"""Compile kernels for an AArch64 processor on any machine: the images that the processor would make itself.

    benchmarks/arm_compiler.py FOLDER PROCESSOR FILE.KERNEL ...

Numba compiles for the machine it runs on; here it is told that this one is an Arm. It then loads nothing of
what it compiled. LLVM still turns each function into an object, as when it is loaded: that changes the
function's intermediate code, which others inline. So the images are those of a board, byte for byte, but
for the path of Numba in the texts of errors that kernels never raise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgemerge.native.image import Image
from edgemerge.native.names import image_name

TRIPLE = "aarch64-unknown-linux-gnu"
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
    pretend_to_be_arm()
    from edgemerge.native.compiler import compile_image

    for full_name in names:
        file, name = full_name.split(".")
        (folder / image_name(file, name)).write_bytes(compile_image(file, name).to_bytes())


def pretend_to_be_arm() -> None:
    """Let Numba compile for AArch64, and run nothing of it."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: TRIPLE
    from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
    from numba.core.dispatcher import Dispatcher

    def emit_object(library: Any) -> None:
        library._codegen._tm.emit_object(library._final_module)

    def no_pointer(library: Any, name: str) -> int:
        library._ensure_finalized()
        return 1

    JITCodeLibrary._finalize_specific = emit_object
    JITCodeLibrary.get_pointer_to_function = no_pointer
    JITCPUCodegen.set_env = lambda *_: None
    dispatcher: Any = Dispatcher
    dispatcher.enable_caching = lambda _: None  # a cache takes the objects of what was loaded


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
