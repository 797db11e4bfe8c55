"""The work on one tensor, or on some of its rows: the same function on a thread here and on a cluster."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from edgemerge.alignment.reordering import Permutations
from edgemerge.budget import Arena
from edgemerge.formats import OpenModels
from edgemerge.formats.mixture import open_mixture
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.merging.stream import TensorStream
from edgemerge.merging.traffic import PartResult, Traffic
from edgemerge.methods.shared_tensor import ThreadGroup
from edgemerge.output.places import Places, RowWriter
from edgemerge.types import Float64, Plan, Recipe, Source

__all__ = ["Done", "Executor", "Task", "Workshop", "open_input"]

Done: TypeAlias = PartResult | Float64
"""What a task returns: the checksums of the rows that it made, or what it measured."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Rows [start, stop) of a tensor, to be made; or the whole tensor, to be measured."""

    number: int  # of the tensor in the plan
    start: int
    stop: int
    measures: bool = False
    layer_sum: Float64 | None = None  # what was measured, summed over the tensor's layer


class Executor(Protocol):
    """Does tasks, on threads of this process or on a cluster."""

    def run(
        self, tasks: Sequence[Task], places: Places, on_done: Callable[[Task, Done], None]
    ) -> None:
        """Do all tasks.

        Parameters
        ----------
        tasks : sequence of Task
            Each of a whole tensor.
        places : mapping
            Where the tensors that are made are written to.
        on_done : callable
            Called with each part of a task that is done, from any thread; `Task.number` is the tensor's.

        Raises
        ------
        EdgemergeError
            The first error of a task. All work has stopped.
        """


def open_input(recipe: Recipe, path: Path, stack: ExitStack, models: OpenModels) -> Source:
    """Open a model of a recipe; the stack closes it. A mixture has no gates yet."""
    if recipe.mixture is not None:
        return open_mixture(recipe.mixture, recipe.seed, stack, with_gates=False)
    return models.open(path)


class Workshop:
    """What a process needs to make tensors: the plan, the open models, and memory for each thread.

    Parameters
    ----------
    the_plan : Plan
        Its blocks fit the arenas of this process.
    sources : sequence of Source
        The open models, as `the_plan.models` lists them.
    matrices : mapping of Path to ImportanceMatrix
        Open; those that the plan uses.
    permutations : Permutations
        How heads and neurons are permuted.
    """

    def __init__(
        self,
        the_plan: Plan,
        sources: Sequence[Source],
        matrices: Mapping[Path, ImportanceMatrix],
        permutations: Permutations,
    ) -> None:
        self.plan = the_plan
        self._sources, self._matrices = sources, matrices
        self._permutations = permutations
        self._arenas: queue.SimpleQueue[Arena] = queue.SimpleQueue()
        for _ in range(the_plan.workers):
            self._arenas.put(Arena(the_plan.arena_bytes))

    def group(self, task: Task, n_workers: int = 1) -> ThreadGroup:
        """Return the group of the threads that do a task together."""
        height = max(1, self.plan.jobs[task.number].rows_per_block)
        return ThreadGroup(n_workers, -(-(task.stop - task.start) // height))

    def do(
        self, task: Task, writer: RowWriter | None, group: ThreadGroup, traffic: Traffic
    ) -> Done:
        """Do a thread's part of a task.

        Parameters
        ----------
        task : Task
            What to do.
        writer : RowWriter, optional
            Takes the rows, where the task makes some.
        group : ThreadGroup
            From `group`; all of its threads call this.
        traffic : Traffic
            Counts bytes, and stops the work.

        Raises
        ------
        EdgemergeError, Stopped
            The group is aborted.
        """
        arena = self._arenas.get()
        try:
            stream = TensorStream(
                self.plan.jobs[task.number],
                self._sources,
                arena,
                self.plan,
                traffic,
                self._permutations,
                self._matrices,
                group.join(),
                (task.start, task.stop),
            )
            if task.measures:
                return stream.measure()
            assert writer is not None
            return stream.run(writer, task.layer_sum)
        except BaseException:
            group.abort()
            raise
        finally:
            self._arenas.put(arena)
