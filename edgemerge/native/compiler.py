"""The child of `edgemerge.native.store`: compiles kernels with Numba and leaves their images in a folder.

python -m edgemerge.native.compiler FOLDER FILE.KERNEL ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.core.registry import cpu_target
from numba.core.sigutils import normalize_signature

from edgemerge.errors import RuntimeFailure
from edgemerge.native.function import Function
from edgemerge.native.image import NEVER_CALLED, Image
from edgemerge.native.linker import LinkError, link
from edgemerge.native.names import image_name
from edgemerge.native.probe import SIGNATURE, gives_known_result, probe
from edgemerge.native.signatures import SIGNATURES

__all__ = ["check_numba", "compile_image", "compile_object"]

# All that a kernel may call: what compilers make of loops, and log2, whose last bits are rounded away.
LIBRARY = {"memcpy", "memmove", "memset", "log2", "floorf", "rintf", NEVER_CALLED}

# LLVM keeps to half of AVX-512's width on Intel's processors, as the first that had it ran slower while it
# was used. From Ice Lake on, which has VBMI2, whole vectors make the searches of encoders 1.3 times as fast.
if config.CPU_NAME is None and config.CPU_FEATURES is None:
    features = get_host_cpu_features()
    if "+avx512vbmi2" in features:
        config.CPU_FEATURES = f"{features},-prefer-256-bit"


def compile_image(file: str, name: str) -> Image:
    """Compile one kernel for this processor, or for that of NUMBA_CPU_NAME.

    Raises
    ------
    LinkError
        It allocates, raises or calls what kernels must not.
    """
    image = link(*compile_object(file, name))
    if foreign := {called for _, called in image.imports} - LIBRARY:
        raise LinkError(f"{file}.{name} calls {', '.join(sorted(foreign))}")
    return image


def compile_object(file: str, name: str) -> tuple[bytes, str]:
    """Compile one kernel to an object file; return it with the name of its function."""
    kernel = getattr(import_module(f"edgemerge.kernels.{file}"), name)
    # Not the dispatcher of the file itself: one that comes from Numba's cache has no LLVM code any more.
    options = {k: v for k, v in kernel.targetoptions.items() if k in ("nogil", "error_model")}
    return _compile(kernel.py_func, SIGNATURES[file][name], options)


@cache
def check_numba() -> None:
    """Compile a function whose result is known, and call it as kernels are called.

    Raises
    ------
    RuntimeFailure
        The result is another. What reads numbers as addresses may also end this process.
    """
    image = link(*_compile(probe, SIGNATURE, {"nogil": True}))
    if not gives_known_result(Function(image, SIGNATURE)):
        raise RuntimeFailure(f"a self-test of numba {numba.__version__} gave a wrong result")


def _compile(
    function: Callable[..., None], signature: str, options: Mapping[str, Any]
) -> tuple[bytes, str]:
    arguments, _ = normalize_signature(f"({signature},)")
    dispatcher = numba.njit(**options)(function)
    dispatcher.compile(arguments)
    compiled = dispatcher.overloads[arguments]
    symbol = compiled.fndesc.llvm_func_name
    machine = _target_machine()
    module = _reduce(compiled.library, symbol, machine)
    return machine.emit_object(module), symbol


def _target_machine() -> Any:
    """Numba's own target, but for code that may lie anywhere."""
    codegen = cpu_target.target_context.codegen()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=codegen._get_host_cpu_name(),
        features=codegen._get_host_cpu_features(),
        opt=config.OPT,
        reloc="pic",
        codemodel="small",
    )


def _reduce(library: Any, symbol: str, machine: Any) -> Any:
    """Keep of a library, optimised already, the function and what it calls: no wrappers for Python."""
    module = llvm.parse_assembly(str(library._final_module))
    for item in (*module.functions, *module.global_variables):
        if not item.is_declaration and item.name != symbol:
            item.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    return module


def main(folder: Path, names: list[str]) -> None:
    """Compile kernels, each into a file of its own that appears whole."""
    check_numba()
    for full_name in names:
        file, name = full_name.split(".")
        target = folder / image_name(file, name)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        part.write_bytes(compile_image(file, name).to_bytes())
        part.replace(target)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except RuntimeFailure as error:
        sys.exit(str(error))
