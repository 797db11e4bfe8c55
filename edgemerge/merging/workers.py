"""The worker pool of one merge: first the work that spans tensors, then every tensor.

A worker takes a whole tensor, largest first, and cuts it into blocks of rows. All workers together make a
tensor that is much of the model, such as the embedding of a small model (`edgemerge.methods.shared_tensor`).
The result is the same for every budget and thread count. Two kinds of work span tensors: the alignment of
heads and neurons, and what a method measures over whole layers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from edgemerge.alignment.heads import SOFT_WARNING, align_models
from edgemerge.alignment.neurons import NeuronPlan, match_neurons
from edgemerge.alignment.records import HeadPlan, Skipped
from edgemerge.budget import Arena
from edgemerge.errors import Stopped
from edgemerge.finding.cache import folder_name
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.merging.input_rows import Permutations
from edgemerge.merging.stream import TensorStream
from edgemerge.merging.traffic import PartResult, Traffic, join_parts
from edgemerge.methods.shared_tensor import ThreadGroup
from edgemerge.methods.table import METHODS
from edgemerge.output.checksums import TensorResult
from edgemerge.output.places import Places
from edgemerge.planning.plan import alignment_pairs
from edgemerge.remote.stand_ins import stop_reading
from edgemerge.types import BeginPart, Float64, Plan, Progress, Source, TensorJob, ignore_parts

__all__ = ["WorkerPool"]

R = TypeVar("R")

POLL_SECONDS = 0.1


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

    Attributes
    ----------
    permutations : Permutations
        The same, once `prepare` has found it.
    """

    def __init__(
        self,
        the_plan: Plan,
        sources: Sequence[Source],
        progress: Progress | None,
        matrices: Mapping[Path, ImportanceMatrix],
        begin_part: BeginPart = ignore_parts,
        permutations: Permutations | None = None,
    ) -> None:
        self._matrices = matrices
        self.plan = the_plan
        self.sources = sources
        self.traffic = Traffic()
        self._progress = progress
        self._begin_part = begin_part
        self._is_aligned = permutations is not None
        self.permutations: Permutations = permutations or {}
        self._layer_sums: dict[int, Float64] = {}
        self._results: dict[int, TensorResult] = {}
        self._taken_over = 0  # bytes read and written by an earlier run
        self._total = the_plan.read_bytes + sum(job.out.nbytes for job in the_plan.jobs)
        self._arenas: queue.SimpleQueue[Arena] = queue.SimpleQueue()

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
        self._report()

    def prepare(self) -> tuple[str, ...]:
        """Do the work that spans tensors. Return notes for the user."""
        try:
            notes = [] if self._is_aligned else self._find_permutations()
        except BaseException:
            self.traffic.stop.set()
            raise
        for _ in range(self.plan.workers):
            self._arenas.put(Arena(self.plan.arena_bytes))
        self._measure_layers()
        return tuple(notes)

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
        numbers = {job.out.name: i for i, job in enumerate(self.plan.jobs)}
        parts: dict[str, list[PartResult]] = {name: [] for name in numbers}
        lock = threading.Lock()

        def make(stream: TensorStream) -> None:
            job = stream.job
            layer = _measured_layer(job)
            layer_sum = None if layer is None else self._layer_sums[layer]
            part = stream.run(places[job.out.name], layer_sum)
            with lock:
                parts[job.out.name].append(part)
                is_finished = len(parts[job.out.name]) == job.workers
            if is_finished:
                i = numbers[job.out.name]
                self._results[i] = join_parts(parts[job.out.name])
                on_finished(i, self._results[i])

        self._each(self._jobs_left(), make)
        return [self._results[i] for i in range(len(self.plan.jobs))]

    def _jobs_left(self) -> list[TensorJob]:
        return [job for i, job in enumerate(self.plan.jobs) if i not in self._results]

    # -- what spans tensors ------------------------------------------------------------------------

    def _find_permutations(self) -> list[str]:
        notes = self._align() if self.plan.align != "off" else []
        return notes + (self._match_neurons() if self.plan.recipe.neurons else [])

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
            )
            for (reference_layer, layer), heads in zip(layers, found, strict=True):
                if isinstance(heads, HeadPlan):
                    at = (left, right, reference_layer, layer)
                    self.permutations.setdefault(at, []).append(heads)
            notes += _say(folder_name(self.sources[right].path), found)
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
            self._report()
        return done.result()

    def _measure_layers(self) -> None:
        """Measure the tensors of each layer, and sum what is found in the order of the jobs."""
        layers = {_measured_layer(job) for job in self._jobs_left()} - {None}
        jobs = [job for job in self.plan.jobs if _measured_layer(job) in layers]
        sums = self._layer_sums
        for job, (found, *_) in zip(jobs, self._each(jobs, TensorStream.measure), strict=True):
            layer = _measured_layer(job)
            assert layer is not None
            sums[layer] = sums[layer] + found if layer in sums else found

    # -- workers -----------------------------------------------------------------------------------

    def _each(self, jobs: Sequence[TensorJob], work: Callable[[TensorStream], R]) -> list[list[R]]:
        """Do the work on every tensor. Return what each worker of each tensor returned.

        The largest tensors come first, so that none of them is left for one worker at the end. A group
        always becomes complete: its tasks are neighbours in the queue, and the pool has a thread for each.
        """

        def run(job: TensorJob, group: ThreadGroup) -> R:
            arena = self._arenas.get()
            try:
                stream = TensorStream(
                    job,
                    self.sources,
                    arena,
                    self.plan,
                    self.traffic,
                    self.permutations,
                    self._matrices,
                    group.join(),
                )
                return work(stream)
            except BaseException:
                group.abort()
                raise
            finally:
                self._arenas.put(arena)

        groups = [ThreadGroup(job.workers, job.n_blocks) for job in jobs]
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].out.n_elements)
        with ThreadPoolExecutor(self.plan.workers, "edgemerge") as executor:
            # Submit inside `try`: after an interrupt here, a part of a group would wait for the rest.
            try:
                futures = {
                    i: [executor.submit(run, jobs[i], groups[i]) for _ in range(jobs[i].workers)]
                    for i in order
                }
                self._wait([future for part in futures.values() for future in part])
            except BaseException:
                self.traffic.stop.set()
                for group in groups:
                    group.abort()
                stop_reading(state.path for source in self.sources for state in source.states())
                executor.shutdown(wait=False, cancel_futures=True)
                raise
        return [[future.result() for future in futures[i]] for i in range(len(jobs))]

    def _wait(self, futures: Sequence[Future[R]]) -> None:
        """Wait for all, or raise the first error."""
        finished: queue.Queue[Future[R]] = queue.Queue()
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
            self._report()

    def _report(self) -> None:
        """Report progress. What an earlier run finished counts as read and written."""
        if self._progress is not None:
            done = self._taken_over + self.traffic.read + self.traffic.written
            # A worker that takes more blocks than planned reads some of them again.
            self._progress(min(done, self._total), self._total)


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
    reasons: dict[str, list[int]] = {}
    for heads in found:
        if isinstance(heads, Skipped):
            reasons.setdefault(heads.reason, []).append(heads.layer)
    for reason, layers in reasons.items():
        where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        notes.append(f"heads of {model} left as they are in {where}: {reason}")
    return notes
