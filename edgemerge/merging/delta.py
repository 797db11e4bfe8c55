"""A delta: what an expert changed of its base, tensor by tensor, in few bits.

Read top-down. `make_delta` measures all changes, chooses the form of each, and writes what they are stored
as. Every step reads both models in pieces of a fixed size, so the bytes are the same for every budget and
thread count.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeVar

from edgemerge.budget import floor_bytes
from edgemerge.errors import MismatchError, RecipeError
from edgemerge.formats import OpenModels
from edgemerge.formats.gguf.header import DEFAULT_ALIGNMENT, MAX_NAME_BYTES, align_up
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.layout import FileLayout
from edgemerge.merging.adapter_parts import Spool
from edgemerge.merging.delta_choice import Option, choose
from edgemerge.merging.delta_factors import factor_needs, low_rank_forms
from edgemerge.merging.delta_forms import WHOLE, Coded, Form, find_largest, work_bytes
from edgemerge.merging.delta_header import Making, delta_metadata
from edgemerge.merging.delta_pieces import Measured, TensorOut, losses, measure
from edgemerge.merging.delta_report import DeltaReport, Effort, make_report
from edgemerge.merging.matrices import count_workers, decoding_kernels, work_on_all
from edgemerge.native.store import compile_missing
from edgemerge.output.file import OutputFile, check_output
from edgemerge.planning.differences import Change, join_stacks, list_changes
from edgemerge.planning.plan import DEFAULT_MEMORY
from edgemerge.sizes import format_size
from edgemerge.types import Progress

__all__ = ["BITS", "DEFAULT_KEEP", "DeltaSettings", "make_delta"]

BITS = {1: "Q1_0", 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
DEFAULT_KEEP = 0.95
STEPS = 1000  # of the progress

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class DeltaSettings:
    """How much of a change is stored: one of these, or nothing for `keep` 0.95.

    Attributes
    ----------
    bits : int, optional
        Of each weight: a key of `BITS`.
    density : float, optional
        Part of the elements of each matrix that is stored, the largest; above 0 and at most 1.
    rank : int, optional
        Of the factors of each matrix.
    nbytes : int, optional
        Size of the file at most; each tensor's bits are chosen so that the most energy is stored.
    keep : float, optional
        Part of the energy that is stored in as few bytes as each tensor's bits allow; above 0, below 1.
    """

    bits: int | None = None
    density: float | None = None
    rank: int | None = None
    nbytes: int | None = None
    keep: float | None = None

    def passes(self) -> tuple[float, ...]:
        """Return about which part of the work each pass over the tensors is."""
        return (0.3, 0.7) if self.bits is not None else (0.1, 0.7, 0.2)

    def named(self) -> tuple[str, float]:
        """Return the one that is given, under the name of its option."""
        names = {"bits": self.bits, "sparse": self.density, "rank": self.rank, "size": self.nbytes}
        for name, value in names.items():
            if value is not None:
                return name, value
        return "keep", DEFAULT_KEEP if self.keep is None else self.keep


def make_delta(
    base: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: DeltaSettings,
    *,
    memory: int | None = None,
    threads: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> DeltaReport:
    """Write what an expert changed of its base as a GGUF that stands for the expert in a merge.

    Parameters
    ----------
    base, expert : path
        GGUF files or directories; with adapters or deltas, as BASE+ADAPTER.
    output : path
        The file to make.
    settings : DeltaSettings
        How much of the change is stored.
    memory : int, optional
        Budget in bytes for the whole process, by default 512 MiB.
    threads : int
        Tensors at the same time at most. The result is the same.
    force : bool
        Replace an existing file.
    progress : callable, optional
        Called with elements done and elements in all, from this thread; may raise to stop.

    Raises
    ------
    MismatchError
        The models are no base and fine-tune, or nothing changed.
    RecipeError
        The size is too small for what cannot be left out.
    FormatError, BudgetError, OutputError
        See `edgemerge.errors`; nothing has been written.
    """
    started, floor, path = time.monotonic(), floor_bytes(), Path(output)
    check = partial(check_output, path, (Path(base), Path(expert)), force=force)
    check()
    with ExitStack() as stack:
        models = OpenModels(stack)
        left, right = models.open(Path(base)), models.open(Path(expert))
        listed, notes = list_changes(left, right)
        changes = join_stacks(listed)
        n_workers = count_workers(
            (left, right),
            [one.block_bytes() + work_bytes() for one in changes]
            + factor_needs(listed, settings.rank),
            floor,
            memory,
            threads,
            what="a delta",
            remedy=", and a lower rank takes less" if settings.rank else "",
        )
        compile_missing(decoding_kernels((left, right)) | {"deltas.measure"})
        work = _Work(n_workers, progress, settings.passes())
        measured = work.run(changes, [prod(one.shape) for one in changes], measure)
        if not any(one.squares for one in measured):
            raise MismatchError(f"{right.path} is equal to {left.path}; there is no delta")
        making = Making(left, right, settings.named(), measured)
        spool = Spool(stack.enter_context(tempfile.TemporaryFile(dir=path.absolute().parent)), path)
        forms = _choose_forms(making, settings, listed, spool, work)
        if not forms:
            raise RecipeError(
                "nothing of the change would be stored; give a larger --size or --keep",
                field="size",
            )
        notes = [*notes, *_note_waste(forms, settings)]
        lost = _write(path, making, forms, work, check)
    effort = Effort(time.monotonic() - started, n_workers, memory or DEFAULT_MEMORY)
    return make_report(path, making, forms, lost, effort, tuple(dict.fromkeys(notes)))


class _Work:
    """Passes over the tensors, shown as parts of the progress that add up to all of it."""

    def __init__(self, n_workers: int, progress: Progress | None, parts: Sequence[float]) -> None:
        self._n_workers, self._progress = n_workers, progress
        self._parts, self._done = list(parts), 0.0

    def run(
        self, items: Sequence[T], sizes: Sequence[int], work: Callable[[T, threading.Event], R]
    ) -> list[R]:
        """Work on all items, of so many elements; raises what `work` raises."""
        part, before = self._parts.pop(0), self._done
        self._done += part
        progress = self._progress

        def show(done: int, total: int) -> None:
            if progress is not None:
                progress(round(STEPS * (before + part * done / max(1, total))), STEPS)

        return work_on_all(items, sizes, work, self._n_workers, show)


# -- the forms -------------------------------------------------------------------------------------


def _choose_forms(
    making: Making,
    settings: DeltaSettings,
    listed: Sequence[Change],
    spool: Spool,
    work: _Work,
) -> list[Form]:
    """Choose how each change is stored, in the order of the base's tensors. Vectors are stored whole."""
    changed = [one for one in making.measured if one.squares]
    matrices = [one for one in changed if not one.change.is_vector]
    vectors: list[Form] = [Coded(one, WHOLE) for one in changed if one.change.is_vector]
    sizes = [one.n_elements for one in matrices]
    forms: Sequence[Form]
    if settings.bits is not None:
        forms = [Coded(one, BITS[settings.bits]) for one in matrices]
    elif settings.density is not None:
        forms = work.run(matrices, sizes, partial(find_largest, density=settings.density))
    elif settings.rank is not None:
        forms = low_rank_forms(matrices, listed, making.base, settings.rank, spool, work.run)
    else:
        lost = work.run(matrices, sizes, partial(losses, dtypes=list(BITS.values())))
        options = [_options(*pair) for pair in zip(matrices, lost, strict=True)]
        if settings.nbytes is not None:
            room = _room(making, matrices, vectors, settings.nbytes)
            chosen = choose(options, room=room)
        else:
            keep = settings.named()[1]
            chosen = choose(options, lost=(1.0 - keep) * sum(one.squares for one in changed))
        pairs = zip(matrices, chosen, strict=True)
        forms = [Coded(one, option.dtype) for one, option in pairs if option.dtype is not None]
    places = {one.change.name: i for i, one in enumerate(making.measured)}
    return sorted([*forms, *vectors], key=lambda form: places[form.measured.change.name])


def _note_waste(forms: Sequence[Form], settings: DeltaSettings) -> Iterator[str]:
    """Say that factors or sparse elements take more than all of the change in 8 bits."""
    setting = {"--rank": settings.rank, "--sparse": settings.density}
    named = [f"{name} {value:g}" for name, value in setting.items() if value is not None]
    matrices = [form for form in forms if not form.measured.change.is_vector]
    taken = _stored_bytes(matrices)
    whole = _stored_bytes([Coded(form.measured, BITS[8]) for form in matrices])
    if named and taken > whole:
        yield (
            f"{named[0]} takes {format_size(taken)} for matrices whose whole change takes "
            f"{format_size(whole)} with --bits 8; give that, or a smaller {named[0].split()[0]}"
        )


def _options(measured: Measured, lost: Sequence[float]) -> list[Option]:
    """List what each code takes of the file and loses, and what nothing at all does."""
    options = [Option(None, 0, measured.squares)]
    for dtype, energy in zip(BITS.values(), lost, strict=True):
        options.append(Option(dtype, _stored_bytes([Coded(measured, dtype)]), energy))
    return options


def _room(
    making: Making, matrices: Sequence[Measured], vectors: Sequence[Form], nbytes: int
) -> int:
    """Return the bytes of a file that are left for matrices, whichever of these are stored."""
    forms = [*vectors, *(Coded(one, BITS[8]) for one in matrices)]
    header = len(_lay_out(making, forms, [], 1.0).header)
    fixed = header + _stored_bytes(vectors)
    if nbytes < fixed:
        raise RecipeError(
            f"a delta of {format_size(nbytes)} has no room: its header and the changed vectors, which "
            f"are stored whole, take {format_size(fixed)}; give a larger --size",
            field="size",
        )
    return nbytes - fixed


def _stored_bytes(forms: Sequence[Form]) -> int:
    sizes = (spec.nbytes for form in forms for spec in form.specs())
    return sum(align_up(nbytes, DEFAULT_ALIGNMENT) for nbytes in sizes)


# -- the file --------------------------------------------------------------------------------------


def _write(
    path: Path,
    making: Making,
    forms: Sequence[Form],
    work: _Work,
    check: Callable[[], None],
) -> list[float]:
    """Write the file; return the energy that each form lacks."""
    layout = _lay_out(making, forms, [], 1.0)
    energy = sum(one.squares for one in making.measured)
    with OutputFile(path, layout.n_bytes) as file:
        outs = {name: TensorOut(file.write, at) for name, at in layout.offsets.items()}

        def write(form: Form, stop: threading.Event) -> float:
            return form.write(outs, stop)

        lost = work.run(forms, [form.measured.n_elements for form in forms], write)
        stored = sum(form.measured.squares for form in forms)
        kept = (stored - sum(lost)) / energy
        checksums = [out.checksum for out in outs.values()]
        final = _lay_out(making, forms, checksums, kept)
        assert final.offsets == layout.offsets
        file.write(final.header, 0)
        for source in (making.base, making.expert):
            source.check_unchanged()
        check()  # again, as a file of that name may have come during the work
        file.publish()
    return lost


def _lay_out(
    making: Making, forms: Sequence[Form], checksums: Sequence[int], kept: float
) -> FileLayout:
    """Lay the file out; without checksums, with zeros in their place."""
    specs = [spec for form in forms for spec in form.specs()]
    for spec in specs:
        if len(spec.name.encode()) > MAX_NAME_BYTES:
            raise MismatchError(
                f"a GGUF has no names as long as {spec.name!r}; give --bits, which adds nothing to them",
                tensor=spec.name,
            )
    metadata = delta_metadata(making, forms, checksums or [0] * len(specs), kept)
    return make_layout(metadata, specs)
