"""What a merge sends to each worker of a cluster once, and what the worker makes of it.

A worker opens the models itself, and fits the plan to its own budget. Then it does tasks by the same function
as the threads of a local merge. It writes rows into the output where it sees that file, else it sends them.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from edgemerge.alignment.reordering import Permutations
from edgemerge.errors import ClusterError, EdgemergeError, FormatError, OutputError
from edgemerge.formats import OpenModels
from edgemerge.formats.adapters.reference import expand_inputs
from edgemerge.formats.files import fill_buffers
from edgemerge.formats.mixture import MixtureSource
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.merging.inputs import InputMark, check_marks, find_software
from edgemerge.merging.precompile import precompile
from edgemerge.merging.tasks import Done, Task, Workshop, open_input
from edgemerge.merging.traffic import Traffic
from edgemerge.output.file import write_all
from edgemerge.output.places import TensorPlace
from edgemerge.output.shared import Mark, SharedFile
from edgemerge.planning.memory import fit_plan
from edgemerge.planning.plan import DEFAULT_MEMORY
from edgemerge.remote.stand_ins import StandIns
from edgemerge.types import Float32, Plan, Recipe, TensorSpec, UInt8

if TYPE_CHECKING:
    from distributed import Worker

__all__ = [
    "Kit",
    "Made",
    "do_task",
    "drop_rows",
    "open_kit",
    "read_rows",
    "stop_kit",
]

# In memory for each thread: what is made, what waits to be sent, what is being sent.
PIECES = 4


@dataclass(frozen=True, slots=True)
class SharedPlace:
    """Where a tensor lies in a file that a worker may see."""

    file: Path  # key of `Kit.marks`
    spec: TensorSpec
    layout: Any  # `TensorPlace.layout`


@dataclass(frozen=True, slots=True)
class Made:
    """What a worker did."""

    done: Done
    n_read: int
    raw: UInt8 | None = None  # the rows, where they go to the client
    parcel: str | None = None  # or the name of what `read_rows` reads them from
    worker: str = ""


class Parcel:
    """Rows of one tensor that go to the client: in memory, or many of them in a temporary file."""

    def __init__(self, spec: TensorSpec, task: Task, most: int, folder: str) -> None:
        self._row_bytes, self._first, self._folder = spec.row_bytes, task.start, folder
        n_bytes = (task.stop - task.start) * spec.row_bytes
        self.raw = np.empty(n_bytes, np.uint8) if n_bytes <= max(most, spec.row_bytes) else None
        self._file = None
        if self.raw is None:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def write_rows(self, start: int, raw_u8: UInt8) -> None:
        """Take encoded rows; thread-safe. Raises OutputError where the disk refuses."""
        at = (start - self._first) * self._row_bytes
        if self.raw is not None:
            self.raw[at : at + raw_u8.nbytes] = raw_u8
            return
        assert self._file is not None
        try:
            write_all(self._file.fileno(), raw_u8, at)
        except OSError as error:
            raise OutputError(
                f"the disk cannot keep rows until they are sent ({error.strerror}); free some "
                "space there",
                path=self._folder,
            ) from error

    def read(self, start: int, stop: int) -> UInt8:
        """Return rows that were taken into the file."""
        assert self._file is not None
        out = np.empty((stop - start) * self._row_bytes, np.uint8)
        at = (start - self._first) * self._row_bytes
        fill_buffers(self._file.fileno(), [out.data.cast("B")], at, Path("parcel"), None)
        return out

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()


@dataclass(eq=False)
class Kit:
    """All that tasks of one merge need. It is opened where it is used first, and closed with the last use.

    Attributes
    ----------
    token : str
        Name of the merge.
    plan : Plan
        Without metadata, which no tensor needs.
    permutations : Permutations
        How heads and neurons are permuted.
    inputs : sequence of InputMark
        What shows that a worker's models are the client's.
    gates : mapping of int to float32 array
        Rows of the gates of each layer, where the model is a mixture.
    stand_ins : StandIns
        The models at addresses.
    marks : mapping of Path to Mark
        The output's files.
    places : mapping of str to SharedPlace
        Tensors that a worker may write by itself.
    software : mapping of str to str
        Versions, from `find_software`.
    piece_bytes : int
        Of rows that are sent at a time; one row at least.
    """

    token: str
    plan: Plan
    permutations: Permutations
    inputs: tuple[InputMark, ...]
    gates: Mapping[int, Float32]
    stand_ins: StandIns
    marks: Mapping[Path, Mark]
    places: Mapping[str, SharedPlace]
    software: Mapping[str, str]
    piece_bytes: int
    _lock: Any = field(default_factory=threading.Lock, init=False)
    _opened: _Opened | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), _opened=None)

    def open(self, worker: Worker) -> _Opened:
        """Open all, unless that is done.

        Raises
        ------
        ClusterError
            The worker cannot do the work; the sentence names it.
        """
        with self._lock:
            if self._opened is None:
                with ExitStack() as stack:
                    try:
                        self._opened = _Opened(self, worker, stack)
                    except (EdgemergeError, OSError) as error:
                        raise _blame(worker, error) from error
                    weakref.finalize(self, stack.pop_all().close)
                _kits[self.token] = self
            return self._opened


_kits: weakref.WeakValueDictionary[str, Kit] = weakref.WeakValueDictionary()


class _Opened:
    """The open models of a kit, memory for tasks, and rows that wait for the client."""

    def __init__(self, kit: Kit, worker: Worker, stack: ExitStack) -> None:
        check_software(kit.software)
        kit.stand_ins.take()
        stack.callback(kit.stand_ins.drop)
        recipe = kit.plan.recipe
        _refuse_missing(recipe)
        models = OpenModels(stack)
        sources = [open_input(recipe, path, stack, models) for path in kit.plan.models]
        for source in sources:
            if isinstance(source, MixtureSource):
                source.gates = kit.gates.__getitem__
        matrices = {
            mark.path: stack.enter_context(closing(ImportanceMatrix(mark.path)))
            for mark in kit.inputs
            if mark.is_matrix
        }
        check_marks(kit.inputs, sources)
        self.files = {name: SharedFile(mark) for name, mark in kit.marks.items()}
        for name in [name for name, file in self.files.items() if not file.attach()]:
            del self.files[name]
        for file in self.files.values():
            stack.callback(file.detach)
        threads = worker.state.nthreads
        writes_all = kit.places.keys() == {job.out.name for job in kit.plan.jobs} and len(
            self.files
        ) == len(kit.marks)
        beside = 0 if writes_all else PIECES * threads * kit.piece_bytes
        the_plan = fit_plan(
            kit.plan, sources, memory=_find_budget(worker), threads=threads, beside=beside
        )
        precompile(the_plan)
        self.workshop = Workshop(the_plan, sources, matrices, kit.permutations)
        self.stop = threading.Event()
        self.parcels: dict[str, Parcel] = {}
        stack.callback(self.close)

    def place(self, kit: Kit, name: str) -> TensorPlace | None:
        """Return where the worker writes a tensor to by itself."""
        shared = kit.places.get(name)
        if shared is None or shared.file not in self.files:
            return None
        return TensorPlace(self.files[shared.file], shared.spec, shared.layout, (0, 0))

    def close(self) -> None:
        """Stop what is under way, and remove rows that nobody takes any more."""
        self.stop.set()
        for parcel in self.parcels.values():
            parcel.close()


def _refuse_missing(recipe: Recipe) -> None:
    for path in expand_inputs(recipe.inputs()):
        if not path.exists():
            raise FormatError(
                "is not there; put it where all workers see it under this path, or give an address",
                path=path,
            )


def check_software(wanted: Mapping[str, str]) -> None:
    """Refuse to work with other versions than the client has.

    Raises
    ------
    ClusterError
        One differs.
    """
    own = find_software()
    for name, version in wanted.items():
        if own.get(name) != version:
            raise ClusterError(
                f"has {name} {own.get(name)}, where the merge has {version}; install the same there"
            )


def _find_budget(worker: Worker) -> int:
    """Return the bytes that a worker may take before Dask stops giving it tasks."""
    manager = worker.memory_manager
    if not manager.memory_limit:
        return DEFAULT_MEMORY
    return int(manager.memory_limit * (manager.memory_pause_fraction or 1.0))


def _blame(worker: Worker, error: EdgemergeError | OSError) -> ClusterError:
    """Name the worker whose error it is."""
    return ClusterError(f"the worker at {worker.address}: {error}")


# -- what the client calls ----------------------------------------------------------------------------


def open_kit(kit: Kit, _argument: object) -> None:
    """Open a kit on the worker that runs this. Raises ClusterError where the worker cannot do the work."""
    from distributed import get_worker

    kit.open(get_worker())


def do_task(kit: Kit, task: Task) -> Made:
    """Do a task of a kit on the worker that runs this.

    Raises
    ------
    EdgemergeError
        See `edgemerge.errors`.
    Stopped
        The merge has ended.
    """
    from distributed import get_worker

    worker = get_worker()
    opened = kit.open(worker)
    name = kit.plan.jobs[task.number].out.name
    traffic = Traffic(opened.stop)
    try:
        group = opened.workshop.group(task)
        if task.measures:
            return Made(opened.workshop.do(task, None, group, traffic), traffic.read)
        place = opened.place(kit, name)
        if place is not None:
            done = opened.workshop.do(task, place, group, traffic)
            place.file.sync_data()  # the journal will say that it is on the medium
            return Made(done, traffic.read)
        spec = kit.plan.jobs[task.number].out
        parcel = Parcel(spec, task, kit.piece_bytes, worker.local_directory)
        done = opened.workshop.do(task, parcel, group, traffic)
        made = Made(done, traffic.read, parcel.raw, worker=worker.address)
        if parcel.raw is None:
            made = replace(made, parcel=str(uuid4()))
            opened.parcels[str(made.parcel)] = parcel
        return made
    except (OSError, OutputError) as error:
        raise _blame(worker, error) from error


def read_rows(token: str, parcel: str, start: int, stop: int) -> UInt8:
    """Return rows [start, stop) of what a task of a merge made; KeyError where they are not here."""
    opened = _kits[token]._opened
    assert opened is not None
    return opened.parcels[parcel].read(start, stop)


def drop_rows(token: str, parcel: str) -> None:
    """Remove rows that the client has."""
    opened = _kits[token]._opened
    if opened is not None:
        opened.parcels.pop(parcel).close()


def stop_kit(token: str) -> None:
    """Stop the tasks of a merge."""
    kit = _kits.get(token)
    if kit is not None and kit._opened is not None:
        kit._opened.stop.set()
