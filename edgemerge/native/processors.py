"""Kinds of processors that a wheel brings machine code for, and which of them this one is.

A `Variant` is one folder of images. `tools/prebuild.py` compiles all of them, and `edgemerge.native.store`
takes the first that this processor has the instructions of.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["VARIANTS", "Variant", "fitting_variants", "processor_features"]

_V2 = frozenset({"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"})
# pclmulqdq is no part of the level, but all of its processors have it.
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "pclmulqdq"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_V8_2 = frozenset({"asimddp", "asimdrdm", "atomics", "crc32"})

# Kinds of entries of the auxiliary vector (include/uapi/linux/auxvec.h), and bits of the first
# (arch/arm64/include/uapi/asm/hwcap.h), with the names that /proc/cpuinfo gives them.
_HWCAPS = {16: "hwcap", 26: "hwcap2"}
_NAMES = {"hwcap_7": "crc32", "hwcap_8": "atomics", "hwcap_12": "asimdrdm", "hwcap_20": "asimddp"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of processor.

    Attributes
    ----------
    name : str
        Its folder's, below that of the machine.
    cpu, options : str
        What LLVM compiles for: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES.
    needs : frozenset of str
        Instructions without which its code does not run, as /proc/cpuinfo names them.
    """

    name: str
    cpu: str
    options: str
    needs: frozenset[str]


# Best first. LLVM uses half of AVX-512's width for x86-64-v4, which pays on the first processors that had it.
# Those with VBMI2 are faster with whole vectors (`compiler`); the others take the code of x86-64-v3.
VARIANTS = {
    "x86_64": (
        Variant("x86-64-v4", "x86-64-v4", "+pclmul,-prefer-256-bit", _V4 | {"avx512_vbmi2"}),
        Variant("x86-64-v3", "x86-64-v3", "+pclmul", _V3),
        Variant("x86-64-v2", "x86-64-v2", "", _V2),
    ),
    "aarch64": (
        Variant("armv8.2-dotprod", "generic", "+v8.2a,+dotprod", _V8_2),
        Variant("armv8.0", "generic", "", frozenset()),
    ),
}


def fitting_variants(machine: str, features: Collection[str]) -> list[Variant]:
    """List the variants whose code a processor can run, best first.

    Parameters
    ----------
    machine : str
        As `platform.machine` says.
    features : collection of str
        As `processor_features` says.
    """
    return [variant for variant in VARIANTS.get(machine, ()) if variant.needs <= set(features)]


@cache
def processor_features() -> frozenset[str]:
    """Name the instructions of this processor; none where the system does not say.

    On Arm the kernel tells each process of them (getauxval(3)), as an emulator shows another processor's
    /proc/cpuinfo. Those that no variant needs have numbers for names.
    """
    try:
        if platform.machine() == "aarch64":
            return _named_bits(Path("/proc/self/auxv").read_bytes())
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    stated = (line for line in lines if line.startswith("flags"))
    return frozenset(next(stated, "").partition(":")[2].split())


def _named_bits(auxv: bytes) -> frozenset[str]:
    """Instructions in the vector of pairs (kind, value) that the kernel gives a process."""
    whole = auxv[: len(auxv) // 16 * 16]
    bits = (
        f"{_HWCAPS[kind]}_{bit}"
        for kind, value in struct.iter_unpack("<QQ", whole)
        for bit in range(64)
        if kind in _HWCAPS and value >> bit & 1
    )
    return frozenset(_NAMES.get(bit, bit) for bit in bits)
