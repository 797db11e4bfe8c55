"""Which kernels a merge will call, so that all that are missing are compiled at once, before the work.

A kernel that is missing here costs no more than a second child process when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.weighted import weighted_kernels
from edgemerge.methods.table import METHODS
from edgemerge.native.signatures import KERNEL_NAMES, SIGNATURES
from edgemerge.native.store import compile_missing, find_missing
from edgemerge.types import Plan

__all__ = ["find_cold_of_all", "kernels_of", "warm_all", "warm_kernels", "warm_up"]

ALIGNING = ("heads", "sinkhorn", "permute")  # all kernels of these files
PRUNING = {"magnitude": "select", "band": "select", "random": "dare", "rank": "della"}
SUMMING = ("linear.subtract", "linear.add_deltas")  # of task vectors
AT_ONCE = 8  # kernels that one child of `warm_all` compiles


def warm_up(the_plan: Plan) -> None:
    """Make sure that the kernels of a plan are compiled; does nothing where they are.

    Raises
    ------
    RuntimeFailure
        The compiler failed.
    """
    jobs = [job for job in the_plan.jobs if not job.is_byte_copy]
    if jobs:
        warm_kernels(
            the_plan.recipe.method,
            the_plan.align,
            read={tensor.spec.dtype for job in jobs for tensor in job.inputs},
            written={job.out.dtype for job in jobs if not job.is_weighted},
            weighed={job.out.dtype for job in jobs if job.is_weighted},
            neurons=the_plan.recipe.neurons,
        )


def warm_kernels(
    method: str,
    align: str,
    *,
    read: Collection[str],
    written: Collection[str],
    weighed: Collection[str] = (),
    neurons: bool = False,
) -> None:
    """Make sure that the kernels of a method and of some types are compiled.

    Parameters
    ----------
    method, align : str
        As in a `Plan`.
    read, written, weighed : collection of str
        ggml types that are decoded, encoded, and encoded by an importance matrix.
    neurons : bool
        Whether feed-forward neurons are matched.

    Raises
    ------
    RuntimeFailure
        The compiler failed.
    """
    moves = align != "off" or neurons
    compile_missing(kernels_of(method, read, written, weighed, moves=moves))


def kernels_of(
    method: str,
    read: Collection[str],
    written: Collection[str],
    weighed: Collection[str] = (),
    *,
    moves: bool = False,
) -> set[str]:
    """Name the kernels (FILE.KERNEL) of a merge; `moves`: heads or neurons are matched."""
    names = {"norms.count_beyond", *_summing(method)}
    files = [*(ALIGNING if moves else ())]
    if prune := METHODS[method].prune:
        names |= {"norms.row_norms", "gram.add_rows"}
        files.append(PRUNING[prune])
    if moves:
        names |= {"linear.add_scaled"}
    names |= {f"{file}.{name}" for file in files for name in SIGNATURES[file]}
    for way, dtypes in (("decode", read), ("encode", written)):
        names |= {f"{CODECS[d].kernels}.{way}_{d.lower()}" for d in dtypes if CODECS[d].kernels}
    return names.union(*map(weighted_kernels, weighed))


def _summing(method: str) -> tuple[str, ...]:
    """Name the kernels that put the models of a method together."""
    match method:
        case "linear" | "passthrough":
            return ("linear.weighted_sum",)
        case "slerp":
            return ("gram.row_dots", "gram.add_rows", "linear.weighted_sum", "linear.add_scaled")
        case "hierarchical":
            grams = [f"gram.{name}" for name in SIGNATURES["gram"]]
            return (*SUMMING, "linear.add_scaled", *grams)  # which only its scope `row` needs
    if METHODS[method].elect:
        return ("linear.subtract", "ties.elect")
    sums = SUMMING if METHODS[method].prune else ()
    return (*sums, "linear.add_changes")  # which alone adds up what nothing is pruned of


def warm_all(on_step: Callable[[int, int], None]) -> None:
    """Compile every kernel; `on_step` is told how many are compiled, of all."""
    missing, total = find_cold_of_all()
    for i in range(0, len(missing), AT_ONCE):
        on_step(total - len(missing) + i, total)
        compile_missing(missing[i : i + AT_ONCE])
    on_step(total, total)


def find_cold_of_all() -> tuple[list[str], int]:
    """Name the kernels that are not compiled, and count all there are."""
    return find_missing(KERNEL_NAMES), len(KERNEL_NAMES)
