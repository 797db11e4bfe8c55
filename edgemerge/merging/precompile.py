"""Compiles the kernels of a merge before its work, all that are missing at once.

A kernel that this file does not name is compiled when it is first called, in another child process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.weighted import weighted_kernels
from edgemerge.methods.table import METHODS
from edgemerge.native.signatures import KERNEL_NAMES, SIGNATURES
from edgemerge.native.store import compile_missing, find_missing
from edgemerge.types import Plan

__all__ = [
    "find_missing_of_all",
    "kernels_of",
    "precompile",
    "precompile_all",
    "precompile_kernels",
]

ALIGNING = ("heads", "sinkhorn", "permute")  # all kernels of these files
ROTATING = ("small_matrices.decompose", "small_matrices.multiply")
AT_ONCE = 8  # kernels that one child of `precompile_all` compiles


def precompile(the_plan: Plan) -> None:
    """Compile the kernels of a plan that are missing.

    Raises
    ------
    RuntimeFailure
        The compiler failed.
    """
    jobs = [job for job in the_plan.jobs if not job.is_byte_copy]
    specs = [tensor.spec for job in jobs for tensor in job.inputs]
    if jobs:
        precompile_kernels(
            the_plan.recipe.method,
            the_plan.align,
            read={dtype for spec in specs for dtype in (spec.dtype, spec.like) if dtype},
            written={job.out.dtype for job in jobs if not job.is_weighted},
            weighed={job.out.dtype for job in jobs if job.is_weighted},
            neurons=the_plan.recipe.matches_neurons,
            adapts=any(spec.like for spec in specs),
            more={name for job in jobs for name in METHODS[job.method].more_kernels(job)},
        )


def precompile_kernels(
    method: str,
    align: str,
    *,
    read: Collection[str],
    written: Collection[str],
    weighed: Collection[str] = (),
    neurons: bool = False,
    adapts: bool = False,
    more: Collection[str] = (),
) -> None:
    """Compile the kernels of a method and of some types that are missing.

    Parameters
    ----------
    method, align : str
        As in a `Plan`.
    read, written, weighed : collection of str
        ggml types that are decoded, encoded, and encoded by an importance matrix.
    neurons : bool
        Whether feed-forward neurons are matched.
    adapts : bool
        Whether a model has adapters.
    more : collection of str
        FILE.KERNEL of further ones.

    Raises
    ------
    RuntimeFailure
        The compiler failed.
    """
    aligns = align != "off" or neurons
    if align == "full":
        more = {*more, *ROTATING}
    names = kernels_of(method, read, written, weighed, aligns=aligns, adapts=adapts)
    compile_missing(names.union(more))


def kernels_of(
    method: str,
    read: Collection[str],
    written: Collection[str],
    weighed: Collection[str] = (),
    *,
    aligns: bool = False,
    adapts: bool = False,
) -> set[str]:
    """Name the kernels (FILE.KERNEL) of a merge; `aligns`: whether heads or neurons are matched.

    `adapts`: whether a model has adapters.
    """
    names = {"norms.count_overflows", *METHODS[method].kernels}
    if aligns:
        names |= {"linear.add_scaled"}
        names |= {f"{file}.{name}" for file in ALIGNING for name in SIGNATURES[file]}
    if adapts:
        names |= {"deltas.scatter", *(f"lora.{name}" for name in SIGNATURES["lora"])}
    for way, dtypes in (("decode", read), ("encode", written)):
        names |= {f"{CODECS[d].kernels}.{way}_{d.lower()}" for d in dtypes if CODECS[d].kernels}
    return names.union(*map(weighted_kernels, weighed))


def precompile_all(on_step: Callable[[int, int], None]) -> None:
    """Compile every kernel; `on_step` is told how many are compiled, of all."""
    missing, total = find_missing_of_all()
    for i in range(0, len(missing), AT_ONCE):
        on_step(total - len(missing) + i, total)
        compile_missing(missing[i : i + AT_ONCE])
    on_step(total, total)


def find_missing_of_all() -> tuple[list[str], int]:
    """Name the kernels that are not compiled, and count all there are."""
    return find_missing(KERNEL_NAMES), len(KERNEL_NAMES)
