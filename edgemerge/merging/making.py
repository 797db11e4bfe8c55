"""Makes the tensors of a plan: by threads of this process or by a cluster, and into files that end whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgemerge.errors import EdgemergeError
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.merging.destination import Destination
from edgemerge.output.checksums import TensorResult
from edgemerge.output.parts import OutputParts, hash_named
from edgemerge.output.report import FileReport
from edgemerge.output.resume import verify_earlier
from edgemerge.types import BeginPart, Plan, Progress, Source

if TYPE_CHECKING:  # only a merge that runs imports them
    from edgemerge.cluster.connection import Connection
    from edgemerge.merging.workers import WorkerPool
    from edgemerge.output.places import Places

__all__ = ["Inputs", "Outcome", "finish", "make_tensors"]

HASHING = "hashing the output"


class Inputs(NamedTuple):
    """What a merge reads, open: the plan's models first, then one that only gives its tokenizer."""

    sources: Sequence[Source]
    matrices: Mapping[Path, ImportanceMatrix]

    def check_unchanged(self) -> None:
        """Raise FormatError where a file was written to since it was opened."""
        for source in self.sources:
            source.check_unchanged()
        for matrix in self.matrices.values():
            matrix.check_unchanged()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the report says of the run itself."""

    sha256: str
    files: tuple[FileReport, ...]
    notes: tuple[str, ...]
    n_resumed: int
    workers: int
    n_damaged: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


def finish(the_plan: Plan, paths: Sequence[Path], journal: Path, begin_part: BeginPart) -> Outcome:
    """End a run that was cut short when all its files had their names."""
    digest, files = hash_named(paths, journal, begin_part(HASHING))
    note = "an earlier run had finished it, and was stopped before it could say so"
    return Outcome(digest, files, (note,), len(the_plan.jobs), the_plan.workers)


def make_tensors(
    the_plan: Plan,
    inputs: Inputs,
    parts: OutputParts,
    destination: Destination,
    progress: Progress | None,
    begin_part: BeginPart,
    connection: Connection | None,
) -> Outcome:
    """Make what no earlier run has finished; seal the files and give them their names."""
    places = destination.places(parts)
    pool = _new_pool(the_plan, inputs, progress, begin_part, connection, places)
    n_resumed = n_damaged = 0
    if parts.earlier is not None:
        checking = begin_part("checking what is finished")
        jobs = the_plan.jobs
        n_damaged = verify_earlier(parts.earlier, jobs, places, pool.take_over, checking)
        n_resumed = len(parts.earlier.results) - n_damaged
    notes = pool.prepare()

    def note(i: int, result: TensorResult) -> None:
        parts.note(i, result, the_plan.jobs[i].out.nbytes)

    try:
        results = pool.run(places, note)
    except EdgemergeError:
        inputs.check_unchanged()  # the error may come from a write to a model during the merge
        raise
    inputs.check_unchanged()
    layouts = destination.lay_out(results)
    for file, layout in zip(parts.files, layouts, strict=True):
        file.write(layout.header, 0)
    digest, files = parts.hash(begin_part(HASHING))
    destination.publish(parts)
    return Outcome(
        digest,
        files,
        parts.notes + notes,
        n_resumed,
        pool.n_workers,
        n_damaged,
        pool.traffic.read,
        pool.traffic.written + sum(len(layout.header) for layout in layouts),
    )


def _new_pool(
    the_plan: Plan,
    inputs: Inputs,
    progress: Progress | None,
    begin_part: BeginPart,
    connection: Connection | None,
    places: Places,
) -> WorkerPool:
    from edgemerge.merging.workers import WorkerPool

    make_executor = None
    if connection is not None:
        from edgemerge.merging.cluster import on_cluster

        make_executor = on_cluster(connection, places)
    return WorkerPool(
        the_plan,
        inputs.sources,
        progress,
        inputs.matrices,
        begin_part,
        make_executor=make_executor,
    )
