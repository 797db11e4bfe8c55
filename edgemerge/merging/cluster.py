"""A merge's tasks on a cluster: tensors are cut, handed out, and written in place or by this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar
from uuid import uuid4

from edgemerge.cluster.connection import Again, Call, Connection, Shared
from edgemerge.formats.mixture import MixtureSource
from edgemerge.merging.inputs import find_software, mark_inputs
from edgemerge.merging.kit import (
    Kit,
    Made,
    SharedPlace,
    do_task,
    drop_rows,
    open_kit,
    read_rows,
    stop_kit,
)
from edgemerge.merging.tasks import Done, Task
from edgemerge.merging.traffic import PartResult
from edgemerge.merging.workers import MakeExecutor, WorkerPool
from edgemerge.methods.table import METHODS
from edgemerge.output.checksums import RowChecksum, join_checksums
from edgemerge.output.places import Places, TensorPlace
from edgemerge.output.shared import mark_files
from edgemerge.remote.stand_ins import list_stand_ins
from edgemerge.types import TensorJob, UInt8

__all__ = ["ClusterExecutor", "on_cluster"]

A = TypeVar("A")
R = TypeVar("R")

# Of a tensor that is cut: large enough that Dask's few milliseconds for a call do not matter, and small
# enough that the 45 million elements of a 7B's feed-forward matrix keep six threads busy.
PIECE_ELEMENTS = 1 << 23
PIECE_BYTES = 4 << 20  # of an output, that are sent at a time


def on_cluster(connection: Connection, places: Places) -> MakeExecutor:
    """Return what makes the executor of a pool whose tensors go to some places."""
    return partial(ClusterExecutor, connection, places)


class ClusterExecutor:
    """Does a pool's tasks on a cluster.

    Parameters
    ----------
    connection : Connection
        To the cluster.
    places : mapping
        Where all tensors are written to. The files get marks that workers look for.
    pool : WorkerPool
        Whose heads and neurons are aligned.

    Raises
    ------
    ClusterError
        There is no worker, or one cannot do this merge; the sentence names it and what it lacks.
    """

    def __init__(self, connection: Connection, places: Places, pool: WorkerPool) -> None:
        self._connection, self._pool = connection, pool
        self._token = str(uuid4())
        self._kit = Shared(_pack(pool, places, self._token))
        workers = connection.workers()
        calls = [Call(None, "open", address) for address in workers]
        self._run(open_kit, calls, lambda _none, _nothing: None)
        pool.n_workers = sum(workers.values())
        processes = f"{len(workers)} process{'es' * (len(workers) > 1)}"
        pool.notes.append(f"made by {processes} of {connection.address}")

    def run(
        self, tasks: Sequence[Task], places: Places, on_done: Callable[[Task, Done], None]
    ) -> None:
        """Do all tasks; see `edgemerge.merging.tasks.Executor`."""
        jobs = self._pool.plan.jobs

        def take(task: Task, made: Made) -> None:
            place = None if task.measures else places[jobs[task.number].out.name]
            if place is not None and (made.raw is not None or made.parcel is not None):
                self._write(task, made, place)
            self._pool.traffic.add(made.n_read, 0 if place is None else _n_bytes(place, task))
            on_done(task, made.done)

        largest = sorted(tasks, key=lambda task: -jobs[task.number].out.n_elements)
        calls = [
            Call(piece, f"{'measure' if piece.measures else 'merge'} {jobs[piece.number].out.name}")
            for task in largest
            for piece in _cut(task, jobs[task.number])
        ]
        self._run(do_task, calls, take)

    def _run(
        self,
        function: Callable[[Kit, A], R],
        calls: Sequence[Call[A]],
        on_result: Callable[[A, R], None],
    ) -> None:
        try:
            self._connection.run(function, self._kit, calls, on_result, self._pool.report)
        except BaseException:
            self._pool.traffic.stop.set()
            self._connection.tell(stop_kit, self._token)
            raise

    def _write(self, task: Task, made: Made, place: TensorPlace) -> None:
        """Write the rows that a worker made, a piece at a time.

        Raises
        ------
        Again
            They did not come as they were made.
        """
        checksum = RowChecksum()
        whole = None if made.raw is None else [(task.start, made.raw)]
        pieces = whole or self._fetch(task, made, place)
        for start, raw in pieces:
            place.write_rows(start, raw)
            checksum.add(start, raw.nbytes // place.spec.row_bytes, raw)
        if made.parcel is not None:
            self._connection.tell(drop_rows, self._token, made.parcel, worker=made.worker)
        assert isinstance(made.done, PartResult)
        if join_checksums([checksum]) != join_checksums([made.done.output]):
            raise Again

    def _fetch(self, task: Task, made: Made, place: TensorPlace) -> Iterator[tuple[int, UInt8]]:
        height = max(1, PIECE_BYTES // place.spec.row_bytes)
        for start in range(task.start, task.stop, height):
            stop = min(start + height, task.stop)
            arguments = (self._token, made.parcel, start, stop)
            yield start, self._connection.ask(read_rows, *arguments, worker=made.worker)


def _n_bytes(place: TensorPlace, task: Task) -> int:
    return (task.stop - task.start) * place.spec.row_bytes


def _cut(task: Task, job: TensorJob) -> Iterator[Task]:
    """Cut a task by rows where each row of the result comes of the same rows of the inputs alone."""
    height = job.out.n_rows
    if not task.measures and _goes_by_rows(job):
        by_elements = PIECE_ELEMENTS // job.out.n_cols
        height = max(1, min(by_elements, PIECE_BYTES // job.out.row_bytes))
    for start in range(task.start, task.stop, height):
        yield replace(task, start=start, stop=min(start + height, task.stop))


def _goes_by_rows(job: TensorJob) -> bool:
    """Tell whether a method reads each row once, so that it knows nothing of a tensor as a whole."""
    if job.is_copy:
        return True
    method = METHODS[job.method]
    return method.passes(job) == 1 and not method.spans_layer(job)


def _pack(pool: WorkerPool, places: Places, token: str) -> Kit:
    """Put together what workers need."""
    own = {  # what others may write at the same time
        name: place for name, place in places.items() if isinstance(place.lock, nullcontext)
    }
    gates = {}
    for source in pool.sources:
        if isinstance(source, MixtureSource):
            gates = source.all_gates()
    recipe = replace(pool.plan.recipe, stages=(), notes=(), chat_template=None)
    return Kit(
        token=token,
        plan=replace(pool.plan, recipe=recipe, metadata={}, notes=()),
        permutations=pool.permutations,
        inputs=mark_inputs(pool.sources[: len(pool.plan.models)], pool.matrices),
        gates=gates,
        stand_ins=list_stand_ins(),
        marks=mark_files({place.file for place in own.values()}),
        places={
            name: SharedPlace(place.file.path, place.spec, place.layout)
            for name, place in own.items()
        },
        software=find_software(),
        piece_bytes=PIECE_BYTES,
    )
