"""Numba that compiles for another kind of machine, and runs nothing of it.

Numba compiles for the machine it runs on, whose name it asks of LLVM; here it gets another answer. LLVM still
turns each function into an object, as where it is loaded, for that changes the function's intermediate code,
which others inline. So the images are those that the other machine would make.
"""

from __future__ import annotations

from typing import Any

__all__ = ["compile_for"]


def compile_for(machine: str) -> None:
    """Change the Numba of this process, before it is first imported, for good.

    Parameters
    ----------
    machine : str
        As `platform.machine` would say there.
    """
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: f"{machine}-unknown-linux-gnu"
    from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
    from numba.core.dispatcher import Dispatcher

    def emit_object(library: Any) -> None:
        library._codegen._tm.emit_object(library._final_module)

    def no_pointer(library: Any, name: str) -> int:
        library._ensure_finalized()
        return 1

    replaced: list[tuple[Any, str, Any]] = [
        (JITCodeLibrary, "_finalize_specific", emit_object),
        (JITCodeLibrary, "get_pointer_to_function", no_pointer),
        (JITCPUCodegen, "set_env", lambda *_: None),
        # A cache takes the objects of what was loaded.
        (Dispatcher, "enable_caching", lambda _: None),
    ]
    for owner, name, function in replaced:
        setattr(owner, name, function)
