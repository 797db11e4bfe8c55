"""The model of a trial: one GGUF file, in which only the tensors are made whose settings changed.

The file lies beside the recipe that is written at the end, as a part without a final name. It is never
synced: after a power cut it is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from edgemerge.alignment.reordering import Permutations
from edgemerge.budget import floor_bytes
from edgemerge.formats import open_model
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.layout import FileLayout
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.merging.precompile import precompile
from edgemerge.merging.run import usable_processors
from edgemerge.merging.workers import WorkerPool
from edgemerge.methods.table import METHODS
from edgemerge.output.file import OutputFile
from edgemerge.output.places import place_in_order
from edgemerge.planning.importance import list_matrices
from edgemerge.planning.plan import alignment_pairs, make_plan
from edgemerge.token_rows import RowMap
from edgemerge.types import BeginPart, FileState, Plan, Recipe, Source, TensorJob, ignore_parts

__all__ = ["ModelFile"]


class ModelFile:
    """A model that is made again and again; use it in a `with` statement.

    Parameters
    ----------
    path : Path
        The file is PATH.part, which is removed at the end.
    memory, threads : int, optional
        As for `edgemerge.merging.run.merge`.
    """

    def __init__(self, path: Path, *, memory: int | None, threads: int | None) -> None:
        self._final = path
        self._memory, self._threads = memory, threads or usable_processors()
        self._floor = floor_bytes()
        self._stack = ExitStack()
        self._file_stack = self._stack.enter_context(ExitStack())
        self._sources: dict[Path, Source] = {}
        self._matrices: dict[Path, ImportanceMatrix] = {}
        self._file: OutputFile | None = None
        self._layout: FileLayout | None = None
        self._permutations: Permutations | None = None  # found once for what is in `_across`
        self._across: object = None  # what all tensors depend on beside their jobs
        self._jobs: dict[str, TensorJob] = {}  # as the tensors in the file were made, by name

    @property
    def path(self) -> Path:
        """Where the model lies, once it was made."""
        assert self._file is not None
        return self._file.part

    @property
    def n_bytes(self) -> int:
        """Size of the model, once it was made."""
        assert self._layout is not None
        return self._layout.n_bytes

    def states(self) -> list[FileState]:
        """Return what the files of the models are that were read."""
        return [state for source in self._sources.values() for state in source.states()]

    def make(self, recipe: Recipe, begin_part: BeginPart = ignore_parts) -> int:
        """Make the model of a recipe.

        Parameters
        ----------
        recipe : Recipe
            Of one merge, without stages.
        begin_part : callable, optional
            As for `edgemerge.merging.run.merge`.

        Returns
        -------
        int
            Tensors that were made; the others were so already.

        Raises
        ------
        EdgemergeError
            As of `edgemerge.merging.run.merge`.
        """
        the_plan = make_plan(
            recipe,
            self._open,
            memory=self._memory,
            threads=self._threads,
            floor=self._floor,
        )
        for path in list_matrices(the_plan.jobs, recipe):
            if path not in self._matrices:
                matrix = ImportanceMatrix(path)
                self._matrices[path] = self._stack.enter_context(closing(matrix))
        layout = make_layout(the_plan.metadata, [job.out for job in the_plan.jobs])
        if layout != self._layout:
            self._renew(layout)
        pairs = alignment_pairs(the_plan.jobs) if the_plan.reorders else None
        across = (
            the_plan.models,
            the_plan.align,
            recipe.neurons,
            recipe.seed,
            recipe.imatrix,
            pairs,
        )
        if across != self._across:
            self._across, self._jobs, self._permutations = across, {}, None
        changed = self._changed(the_plan)
        if changed:
            self._merge(replace(the_plan, jobs=tuple(changed)), layout, begin_part)
        return len(changed)

    def _open(self, path: Path) -> Source:
        if path not in self._sources:
            self._sources[path] = self._stack.enter_context(closing(open_model(path)))
        return self._sources[path]

    def _renew(self, layout: FileLayout) -> None:
        """Make a file of another layout, without tensors."""
        self._layout, self._jobs = None, {}
        self._file_stack.close()
        self._file = self._file_stack.enter_context(OutputFile(self._final, layout.n_bytes))
        self._file.write(layout.header, 0)
        self._layout = layout

    def _changed(self, the_plan: Plan) -> list[TensorJob]:
        """List the tensors to make; with one, all of its layer where the method measures layers."""
        changed = {
            job.name: job
            for job in the_plan.jobs
            if not (known := self._jobs.get(job.name)) or not _is_same(known, job)
        }
        # What joins or leaves the sum of a layer changes all that is made by it.
        earlier = [self._jobs[name] for name in changed if name in self._jobs]
        layers = {
            layer_index(job.name)
            for job in (*changed.values(), *earlier)
            if METHODS[job.method].spans_layer(job)
        } - {None}
        return [
            job for job in the_plan.jobs if job.name in changed or layer_index(job.name) in layers
        ]

    def _merge(self, part: Plan, layout: FileLayout, begin_part: BeginPart) -> None:
        assert self._file is not None
        precompile(part)
        for job in part.jobs:
            self._jobs.pop(job.name, None)  # should this be interrupted, it is to be made
        sources: Sequence[Source] = [self._sources[path] for path in part.models]
        progress = begin_part("merging")
        pool = WorkerPool(part, sources, progress, self._matrices, begin_part, self._permutations)
        pool.prepare()
        self._permutations = pool.permutations
        pool.run(
            {
                job.name: place_in_order(self._file, layout.offsets[job.name], job.out)
                for job in part.jobs
            },
            lambda _number, _result: None,
        )
        for source in sources:
            source.check_unchanged()
        self._jobs |= {job.name: job for job in part.jobs}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def _is_same(one: TensorJob, other: TensorJob) -> bool:
    """Tell whether two jobs make the same bytes, whatever the blocks they are cut into."""
    first, second = (
        replace(job, rows=None, rows_per_block=0, passes=0, workers=1, cached_blocks=0)
        for job in (one, other)
    )
    return first == second and _have_same_rows(one.rows, other.rows)


def _have_same_rows(one: RowMap | None, other: RowMap | None) -> bool:
    if one is None or other is None:
        return one is other
    return (
        len(one.rows) == len(other.rows)
        and one.n_padding == other.n_padding
        and all(map(np.array_equal, one.donors, other.donors))
        and all(map(np.array_equal, one.rows, other.rows))
    )
