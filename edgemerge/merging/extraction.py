"""A LoRA adapter of what an expert changed: the nearest change of low rank, matrix by matrix."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgemerge.budget import floor_bytes
from edgemerge.errors import MismatchError, OutputError
from edgemerge.formats import open_model
from edgemerge.formats.adapters.reference import expand_inputs
from edgemerge.formats.files import real_path
from edgemerge.formats.hub.files import CONFIG
from edgemerge.merging.adapter_files import output_paths, write_adapter
from edgemerge.merging.adapter_parts import Extracted, Spool
from edgemerge.merging.low_rank import factorise_change, need_bytes
from edgemerge.merging.matrices import count_workers, decoding_kernels, work_on_all
from edgemerge.native.store import compile_missing
from edgemerge.output.file import check_output
from edgemerge.planning.differences import Change, list_changes
from edgemerge.types import Progress

__all__ = ["Extraction", "Found", "check_adapter_output", "extract", "find_factors"]

DEFAULT_RANK = 16
ENERGY_RANK = 128  # bound of the rank where a part of the energy is asked for and no rank


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was extracted."""

    output: Path
    out_bytes: int
    matrices: int  # with factors
    vectors: int  # kept whole
    ranks: tuple[int, int]  # lowest and highest
    kept: float  # part of the sum of squares of all matrices' changes
    notes: tuple[str, ...]


def extract(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "F32",
    memory: int | None = None,
    threads: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Extract a LoRA adapter: what to add to a base to have an expert, as nearly as its rank allows.

    Parameters
    ----------
    base, expert : path
        GGUF files or directories; with adapters, as BASE+ADAPTER.
    output : path
        A file for llama.cpp where it ends in .gguf, else a directory for PEFT.
    rank : int, optional
        Of all factors; by default 16, or with `energy` at most 128.
    energy : float, optional
        Part of the sum of squares of each matrix's change that is kept, above 0 and at most 1.
    dtype : str
        F32 or F16, of the factors.
    memory : int, optional
        Budget in bytes for the whole process, by default 512 MiB.
    threads : int
        Matrices at the same time at most. The result is the same.
    force : bool
        Replace existing files.
    progress : callable, optional
        Called with elements done and elements in all, from this thread; may raise to stop.

    Raises
    ------
    MismatchError, FormatError, BudgetError, OutputError
        See `edgemerge.errors`; nothing has been written.
    """
    floor, path = floor_bytes(), Path(output)
    check = partial(check_adapter_output, path, (Path(base), Path(expert)), force=force)
    check()
    with closing(open_model(base)) as left, closing(open_model(expert)) as right:
        changes, notes = list_changes(left, right)
        bound = rank or (DEFAULT_RANK if energy is None else ENERGY_RANK)
        n_workers = count_workers(
            (left, right),
            [
                need_bytes((one.shape[0], one.shape[1]), bound) + one.block_bytes()
                for one in changes
                if not one.is_vector
            ],
            floor,
            memory,
            threads,
            what=f"rank {bound}",
            remedy=", and a lower rank takes less",
        )
        compile_missing(decoding_kernels((left, right)) | {"lora.add_product"})
        with tempfile.TemporaryFile(dir=path.absolute().parent) as file:
            spool = Spool(file, path)
            find = partial(find_factors, spool=spool, rank=bound, energy=energy)
            sizes = [one.shape[0] * one.shape[-1] for one in changes]
            found = work_on_all(changes, sizes, find, n_workers, progress)
            kept = [one for one, _, _ in found if one is not None]
            if not kept:
                raise MismatchError(
                    f"{right.path} is equal to {left.path}; there is nothing to extract"
                )
            for source in (left, right):
                source.check_unchanged()
            said = write_adapter(path, left, kept, spool, dtype, check)
    total = sum(squares for _, _, squares in found)
    ranks = [one.rank for one in kept if one.rank]
    return Extraction(
        output=path,
        out_bytes=sum(one.stat().st_size for one in output_paths(path)),
        matrices=len(ranks),
        vectors=len(kept) - len(ranks),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        kept=sum(part for _, part, _ in found) / total if total else 1.0,
        notes=(*notes, *said),
    )


def check_adapter_output(path: Path, inputs: tuple[Path, ...], *, force: bool) -> None:
    """Refuse an adapter's name that cannot or must not be written, before any work.

    Raises
    ------
    OutputError
        As of `check_output`, for the file or for those of the directory. Or the directory is one of the
        inputs, or has a model in it.
    """
    paths = output_paths(path)
    if not path.name:  # `.`, `/`, the empty text
        raise OutputError("names no adapter; give the name of a folder, or of a .gguf", path=path)
    if len(paths) > 1 and not path.is_dir():
        if os.path.lexists(path):
            raise OutputError("is a file; give a folder, or a name that ends in .gguf", path=path)
        if not path.absolute().parent.is_dir():
            raise OutputError(f"the folder {path.parent} does not exist; make it first", path=path)
        return
    if len(paths) > 1 and real_path(path) in {real_path(one) for one in expand_inputs(inputs)}:
        raise OutputError("is one of the inputs; choose another name", path=path)
    if len(paths) > 1 and (path / CONFIG).exists():
        raise OutputError(
            "is the folder of a model, which would then be read with the adapter; choose another name",
            path=path,
        )
    for one in paths:
        check_output(one, inputs, force=force)


# -- the work --------------------------------------------------------------------------------------

Found = tuple[Extracted | None, float, float]
"""What is kept of a change, and the squares that are kept of how many."""


def find_factors(
    change: Change, stop: threading.Event, *, spool: Spool, rank: int, energy: float | None
) -> Found:
    """Factorise one change, whose rows are read several times; raises as `Change.pairs`."""
    try:
        return _reduce(change, stop, spool, rank, energy)
    finally:
        change.forget()


def _reduce(
    change: Change, stop: threading.Event, spool: Spool, rank: int, energy: float | None
) -> Found:
    if change.is_vector:
        changed = any(bool(block.any()) for _, block in change.blocks(stop))
        if not changed:
            return None, 0.0, 0.0
        return Extracted(change, 0, spool.add(change.read_expert()), 0), 0.0, 0.0
    factors = factorise_change(change, stop, rank=rank, energy=energy)
    if factors is None:
        return None, 0.0, 0.0
    left, right = spool.add(factors.left), spool.add(factors.right)
    return Extracted(change, factors.rank, left, right), factors.kept, factors.total
