"""What llama.cpp was built with."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from edgemerge.runtime.library import load_library
from edgemerge.runtime.rpc.backend import has_backend

__all__ = ["Accelerator", "LlamaBuild", "missing_features", "read_build"]

_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU of ggml-backend.h; 2 is an integrated one
_KINDS = {_GPU: "GPU", 2: "integrated GPU"}

# Instructions of /proc/cpuinfo, and what `llama_print_system_info` calls kernels that use them.
_KERNELS = {
    "neon": "NEON",
    "asimd": "NEON",
    "asimdhp": "FP16_VA",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
    "ssse3": "SSSE3",
    "avx": "AVX",
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "avx512f": "AVX512",
}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device that llama.cpp can put layers on; memory in bytes."""

    name: str
    description: str
    kind: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class LlamaBuild:
    """What the llama.cpp of this installation is.

    Attributes
    ----------
    version : str
        Of llama-cpp-python.
    features : tuple of str
        What its CPU kernels use: NEON, DOTPROD, AVX2, OPENMP, ...
    can_offload : bool
        Whether it was built for any GPU.
    accelerators : tuple of Accelerator
        Those it finds here.
    is_debug : bool
        Whether it was built without optimisation: its assertions are still in it.
    has_rpc : bool
        Whether models can be split over several boards.
    """

    version: str
    features: tuple[str, ...]
    can_offload: bool
    accelerators: tuple[Accelerator, ...]
    is_debug: bool
    has_rpc: bool


def read_build() -> LlamaBuild:
    """Ask llama.cpp what it is.

    Raises
    ------
    RuntimeFailure
        llama-cpp-python is not installed, or its shared library does not load.
    """
    library = load_library()
    api = library.api
    # "CPU : NEON = 1 | ARM_FMA = 1 | OPENMP = 1 | REPACK = 1 | "
    info = api.llama_print_system_info().decode("utf-8", errors="replace")
    return LlamaBuild(
        version=version("llama-cpp-python"),
        features=tuple(dict.fromkeys(re.findall(r"(\w+) = [1-9]", info))),
        can_offload=library.has_device(),
        accelerators=_list_accelerators(api.llama_cpp._lib),
        is_debug=_has_assertions(Path(api.__file__).parent / "lib"),
        has_rpc=has_backend(library),
    )


def _list_accelerators(library: ctypes.CDLL) -> tuple[Accelerator, ...]:
    """Devices of ggml's list (ggml-backend.h), without the processor itself."""
    handle, text = ctypes.c_void_p, ctypes.c_char_p
    size = ctypes.POINTER(ctypes.c_size_t)
    for name, result, arguments in (
        ("count", ctypes.c_size_t, []),
        ("get", handle, [ctypes.c_size_t]),
        ("type", ctypes.c_int, [handle]),
        ("name", text, [handle]),
        ("description", text, [handle]),
        ("memory", None, [handle, size, size]),
    ):
        function = getattr(library, f"ggml_backend_dev_{name}")
        function.restype, function.argtypes = result, arguments
    found = []
    for i in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(i)
        kind = _KINDS.get(library.ggml_backend_dev_type(device))
        if kind is None:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        label, description = (
            function(device).decode("utf-8", errors="replace")
            for function in (library.ggml_backend_dev_name, library.ggml_backend_dev_description)
        )
        found.append(Accelerator(label, description, kind, total.value, free.value))
    return tuple(found)


def _has_assertions(folder: Path) -> bool:
    """Whether ggml's kernels can fail an assertion, which a release build (NDEBUG) cannot."""
    return any(b"__assert_fail" in file.read_bytes() for file in folder.glob("libggml-cpu*.so"))


def missing_features(features: tuple[str, ...], processor: tuple[str, ...]) -> tuple[str, ...]:
    """Kernels that the processor could run and llama.cpp was built without.

    Parameters
    ----------
    features : tuple of str
        `LlamaBuild.features`.
    processor : tuple of str
        `Board.cpu_features`.
    """
    possible = dict.fromkeys(_KERNELS[name] for name in processor if name in _KERNELS)
    return tuple(kernel for kernel in possible if kernel not in features)
