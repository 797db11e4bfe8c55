"""Which older processors this one can stand in for: the levels of x86-64, as NumPy names their parts.

NumPy reads NPY_DISABLE_CPU_FEATURES when it is imported, so a level needs a process of its own.
"""

from __future__ import annotations

from importlib import import_module

numpy_core = import_module("numpy._core._multiarray_umath")

__all__ = ["LEVELS", "disabled_features", "levels_here"]

# What each level adds, in the names of NumPy before 2.4 and since; what none adds is newer than all of them.
LEVELS = {
    "x86-64-v2": {"SSE3", "SSSE3", "SSE41", "POPCNT", "SSE42", "X86_V2"},
    "x86-64-v3": {"AVX", "F16C", "FMA3", "AVX2", "X86_V3"},
    "x86-64-v4": {"AVX512F", "AVX512CD", "AVX512_SKX", "X86_V4"},
}
# What says that a level is there, since NumPy 2.4 and before.
SIGNS = {
    "x86-64-v2": ("X86_V2", "SSE42"),
    "x86-64-v3": ("X86_V3", "AVX2"),
    "x86-64-v4": ("X86_V4", "AVX512_SKX"),
}


def levels_here() -> list[str]:
    """Levels that this processor has, the lowest first; none on one that is no x86-64."""
    features = numpy_core.__cpu_features__
    return [level for level, (new, old) in SIGNS.items() if features.get(new, features.get(old))]


def disabled_features(level: str) -> str:
    """What NPY_DISABLE_CPU_FEATURES must say for NumPy to compute as on a processor of this level."""
    names = list(LEVELS)
    known = set().union(*(LEVELS[name] for name in names[: names.index(level) + 1]))
    dispatched = [n for n in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__.get(n)]
    return " ".join(name for name in dispatched if name not in known)
