"""The worker pool of one merge: first the work that spans tensors, then every tensor.

A worker takes a whole tensor, largest first, and cuts it into blocks of rows. All workers together make a
tensor that is much of the model, such as the embedding of a small model (`edgemerge.methods.shared_tensor`).
The result is the same for every budget and thread count. Two kinds of work span tensors: the alignment of
heads and neurons, and what a method measures over whole layers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from edgemerge.alignment.heads import SOFT_WARNING, align_models
from edgemerge.alignment.neurons import NeuronPlan, match_neurons
from edgemerge.alignment.records import HeadPlan, Skipped, ValueRotations
from edgemerge.alignment.reordering import Permutations
from edgemerge.errors import Stopped
from edgemerge.finding.cache import folder_name
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.merging.tasks import Done, Executor, Task, Workshop
from edgemerge.merging.traffic import PartResult, Traffic, join_parts
from edgemerge.methods.shared_tensor import ThreadGroup
from edgemerge.methods.table import METHODS
from edgemerge.output.checksums import TensorResult
from edgemerge.output.places import Places
from edgemerge.planning.plan import alignment_pairs
from edgemerge.remote.stand_ins import stop_reading
from edgemerge.types import BeginPart, Float64, Plan, Progress, Source, TensorJob, ignore_parts

__all__ = ["MakeExecutor", "WorkerPool"]

R = TypeVar("R")

POLL_SECONDS = 0.1

MakeExecutor: TypeAlias = Callable[["WorkerPool"], Executor]


class WorkerPool:
    """Workers, each with an arena of its own.

    Parameters
    ----------
    the_plan : Plan
        What to do.
    sources : sequence of Source
        The open models, as `the_plan.models` lists them.
    progress : callable, optional
        Called from the thread that waits.
    matrices : mapping of Path to ImportanceMatrix
        Open; those that the plan uses.
    begin_part : callable, optional
        Called before heads are aligned and before neurons are matched.
    permutations : Permutations, optional
        How heads and neurons are permuted, where an earlier pool of the same models has found it.
    make_executor : callable, optional
        Makes what does the tasks of this pool, once `permutations` is known; by default threads do them.

    Attributes
    ----------
    permutations : Permutations
        The same, once `prepare` has found it.
    matrices, sources, traffic
        For the executor; it counts bytes in `traffic`.
    notes : list of str
        What the user should know of the work.
    n_workers : int
        How many tensors are made at a time.
    """

    def __init__(
        self,
        the_plan: Plan,
        sources: Sequence[Source],
        progress: Progress | None,
        matrices: Mapping[Path, ImportanceMatrix],
        begin_part: BeginPart = ignore_parts,
        permutations: Permutations | None = None,
        make_executor: MakeExecutor | None = None,
    ) -> None:
        self.matrices = matrices
        self.plan = the_plan
        self.sources = sources
        self.traffic = Traffic()
        self.notes: list[str] = []
        self.n_workers = the_plan.workers
        self._progress = progress
        self._begin_part = begin_part
        self._is_aligned = permutations is not None
        self.permutations: Permutations = permutations or {}
        self._layer_sums: dict[int, Float64] = {}
        self._results: dict[int, TensorResult] = {}
        self._make_executor = make_executor or _Threads
        self._taken_over = 0  # bytes read and written by an earlier run
        self._total = the_plan.read_bytes + sum(job.out.nbytes for job in the_plan.jobs)

    def take_over(self, i: int, result: TensorResult) -> None:
        """Count a tensor as made by an earlier run. Call this before `prepare`.

        Parameters
        ----------
        i : int
            Number of the tensor in the plan.
        result : TensorResult
            Its checksums.
        """
        job = self.plan.jobs[i]
        self._results[i] = result
        self._taken_over += job.out.nbytes + job.read_bytes
        self.report()

    def prepare(self) -> tuple[str, ...]:
        """Do the work that spans tensors. Return notes for the user."""
        try:
            if not self._is_aligned:
                self.notes += self._find_permutations()
        except BaseException:
            self.traffic.stop.set()
            raise
        self._executor = self._make_executor(self)
        self._measure_layers()
        return tuple(self.notes)

    def run(
        self,
        places: Places,
        on_finished: Callable[[int, TensorResult], None],
    ) -> list[TensorResult]:
        """Make every tensor that was not taken over. Return the results of all, in the plan's order.

        Parameters
        ----------
        places : mapping
            Where each tensor is written to.
        on_finished : callable
            Called with the number of every finished tensor and its result, from any thread.

        Raises
        ------
        EdgemergeError
            The first error of a worker. All workers have stopped.
        """
        parts: dict[int, list[PartResult]] = {}
        lock = threading.Lock()

        def note(task: Task, part: Done) -> None:
            assert isinstance(part, PartResult)
            with lock:
                found = parts.setdefault(task.number, [])
                n_before = sum(one.output.n_rows for one in found)
                found.append(part)
                n_rows = n_before + part.output.n_rows
                is_finished = n_before < n_rows == self.plan.jobs[task.number].out.n_rows
            if is_finished:
                self._results[task.number] = join_parts(found)
                on_finished(task.number, self._results[task.number])

        tasks = [self._task(i) for i in self._jobs_left()]
        self._executor.run(tasks, places, note)
        return [self._results[i] for i in range(len(self.plan.jobs))]

    def _task(self, number: int) -> Task:
        """Return the task to make a tensor, all of its rows."""
        job = self.plan.jobs[number]
        layer = _measured_layer(job)
        layer_sum = None if layer is None else self._layer_sums[layer]
        return Task(number, 0, job.out.n_rows, layer_sum=layer_sum)

    def _jobs_left(self) -> list[int]:
        return [i for i in range(len(self.plan.jobs)) if i not in self._results]

    # -- what spans tensors ------------------------------------------------------------------------

    def _find_permutations(self) -> list[str]:
        notes = self._align() if self.plan.align != "off" else []
        return notes + (self._match_neurons() if self.plan.recipe.matches_neurons else [])

    def _align(self) -> list[str]:
        """Match every expert's attention heads with those of the base or the first model."""
        notes = [SOFT_WARNING] if self.plan.align == "soft" else []
        progress = self._begin_part("aligning heads")

        def count(n_bytes: int) -> None:
            self.traffic.add(n_bytes, 0)
            progress(self.traffic.read, self.plan.alignment_bytes)

        for (left, right), layers in alignment_pairs(self.plan.jobs).items():
            found = align_models(
                self.sources[left],
                self.sources[right],
                seed=self.plan.recipe.seed,
                arena_bytes=self.plan.arena_bytes,
                threads=self.plan.workers,
                layers=layers,
                on_read=count,
                rotates=self.plan.align == "full",
            )
            for (reference_layer, layer), heads in zip(layers, found, strict=True):
                if isinstance(heads, HeadPlan):
                    at = (left, right, reference_layer, layer)
                    self.permutations.setdefault(at, []).append(heads)
            name = folder_name(self.sources[right].path)
            notes += [*_say(name, found), *_say_of_values(name, found)]
        return notes

    def _match_neurons(self) -> list[str]:
        """Match every expert's feed-forward neurons with those of the base or the first model."""
        notes = []
        for left, right in alignment_pairs(self.plan.jobs):
            name = folder_name(self.sources[right].path)
            found = self._do_aside(
                partial(
                    match_neurons,
                    self.sources[left],
                    self.sources[right],
                    seed=self.plan.recipe.seed,
                    progress=self._begin_part(f"matching neurons of {name}", "layers"),
                )
            )
            reordered = 0
            for plan in found:
                if isinstance(plan, NeuronPlan):
                    reordered += bool(np.any(plan.order != np.arange(len(plan.order))))
                    at = (left, right, plan.layer, plan.layer)
                    self.permutations.setdefault(at, []).append(plan)
            notes.append(f"neurons of {name} reordered in {reordered} of {len(found)} layers")
            reasons = {plan.reason for plan in found if isinstance(plan, Skipped)}
            notes += [f"neurons of {name} left as they are: {reason}" for reason in sorted(reasons)]
        return notes

    def _do_aside(self, work: Callable[[], R]) -> R:
        """Work in another thread, as SciPy may take many seconds and an interrupt must not wait for it."""
        done: Future[R] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="edgemerge-match", daemon=True).start()
        while not wait([done], POLL_SECONDS).done:
            self.report()
        return done.result()

    def _measure_layers(self) -> None:
        """Measure the tensors of each layer, and sum what is found in the order of the jobs."""
        jobs = self.plan.jobs
        layers = {_measured_layer(jobs[i]) for i in self._jobs_left()} - {None}
        found: dict[int, Float64] = {}

        def note(task: Task, measured: Done) -> None:  # the same by each thread of a group
            assert not isinstance(measured, PartResult)
            found[task.number] = measured

        numbers = [i for i, job in enumerate(jobs) if _measured_layer(job) in layers]
        tasks = [Task(i, 0, jobs[i].out.n_rows, measures=True) for i in numbers]
        self._executor.run(tasks, {}, note)
        sums = self._layer_sums
        for i in numbers:
            layer = _measured_layer(jobs[i])
            assert layer is not None
            sums[layer] = sums[layer] + found[i] if layer in sums else found[i]

    def report(self) -> None:
        """Report progress; may raise to stop. What an earlier run finished counts as read and written."""
        if self._progress is not None:
            done = self._taken_over + self.traffic.read + self.traffic.written
            # A worker that takes more blocks than planned reads some of them again.
            self._progress(min(done, self._total), self._total)


class _Threads:
    """Does tasks on threads of this process, the largest first.

    So none of the largest is left for one worker at the end. A group always becomes complete: its tasks are
    neighbours in the queue, and the pool has a thread for each.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._workshop = Workshop(pool.plan, pool.sources, pool.matrices, pool.permutations)

    def run(
        self, tasks: Sequence[Task], places: Places, on_done: Callable[[Task, Done], None]
    ) -> None:
        """Do all tasks; see `Executor`."""
        jobs = self._pool.plan.jobs
        groups = [self._workshop.group(task, jobs[task.number].workers) for task in tasks]
        order = sorted(range(len(tasks)), key=lambda i: -jobs[tasks[i].number].out.n_elements)

        def work(task: Task, group: ThreadGroup) -> None:
            place = None if task.measures else places[jobs[task.number].out.name]
            on_done(task, self._workshop.do(task, place, group, self._pool.traffic))

        with ThreadPoolExecutor(self._pool.plan.workers, "edgemerge") as executor:
            # Submit inside `try`: after an interrupt here, a part of a group would wait for the rest.
            try:
                self._wait(
                    [
                        executor.submit(work, tasks[i], groups[i])
                        for i in order
                        for _ in range(groups[i].n_workers)
                    ]
                )
            except BaseException:
                self._pool.traffic.stop.set()
                for group in groups:
                    group.abort()
                models = self._pool.sources
                stop_reading(state.path for source in models for state in source.states())
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def _wait(self, futures: Sequence[Future[None]]) -> None:
        """Wait for all, or raise the first error."""
        finished: queue.Queue[Future[None]] = queue.Queue()
        for future in futures:
            future.add_done_callback(finished.put)
        left = len(futures)
        while left:
            with suppress(queue.Empty):
                error = finished.get(timeout=POLL_SECONDS).exception()
                left -= 1
                # Other workers of a group raise Stopped. The error that caused it comes too.
                if error is not None and not isinstance(error, Stopped):
                    raise error
            self._pool.report()


def _measured_layer(job: TensorJob) -> int | None:
    """Return the layer whose sum the method needs for this tensor; None where it needs none."""
    spans = not job.is_byte_copy and METHODS[job.method].spans_layer(job)
    return layer_index(job.out.name) if spans else None


def _say(model: str, found: Sequence[HeadPlan | Skipped]) -> list[str]:
    """Say in how many layers heads were reordered, and one sentence for each reason why not."""
    plans = [heads for heads in found if isinstance(heads, HeadPlan)]
    reordered = sum(not heads.is_identity for heads in plans)
    count = f"{reordered} of {len(plans)} layers"
    notes = [f"attention heads of {model} reordered in {count}"] if plans else []
    skipped = [heads for heads in found if isinstance(heads, Skipped)]
    return [*notes, *_say_why(f"heads of {model}", skipped)]


def _say_of_values(model: str, found: Sequence[HeadPlan | Skipped]) -> Iterator[str]:
    """Say the same of values, where these were to be rotated."""
    values = [heads.values for heads in found if isinstance(heads, HeadPlan) and heads.values]
    rotations = [turn for turn in values if isinstance(turn, ValueRotations)]
    if rotations:
        rotated = sum(turn.matrices is not None for turn in rotations)
        yield f"values of {model} rotated in {rotated} of {len(rotations)} layers"
    skipped = [turn for turn in values if isinstance(turn, Skipped)]
    yield from _say_why(f"values of {model}", skipped)


def _say_why(what: str, skipped: Sequence[Skipped]) -> Iterator[str]:
    reasons: dict[str, list[int]] = {}
    for part in skipped:
        reasons.setdefault(part.reason, []).append(part.layer)
    for reason, layers in reasons.items():
        where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        yield f"{what} left as they are in {where}: {reason}"
