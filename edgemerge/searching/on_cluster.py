"""Questions of a search on a cluster: the trials, their order and their values are those of one machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from edgemerge.cluster.connection import Connection
from edgemerge.runtime.evaluation.evaluate import Mark
from edgemerge.runtime.evaluation.on_cluster import run_on_cluster
from edgemerge.runtime.evaluation.results import Results
from edgemerge.runtime.evaluation.suite import Request, Show, answered
from edgemerge.runtime.evaluation.tasks import Task
from edgemerge.runtime.llama import Model
from edgemerge.types import BeginPart

__all__ = ["ClusterAsker"]


class ClusterAsker:
    """Has workers answer the questions of a trial; see `edgemerge.searching.examiner.Ask`.

    Parameters
    ----------
    connection : Connection
        To workers, which see the models of trials under the same path.
    gpu_layers : int, optional
        Layers on a GPU of each worker.

    Attributes
    ----------
    notes : dict of str to None
        What the user should know of the workers, each once.
    """

    def __init__(self, connection: Connection, gpu_layers: int | None) -> None:
        self.notes: dict[str, None] = {}
        self._connection, self._gpu_layers = connection, gpu_layers

    def __call__(
        self, model: Model, tasks: Sequence[Task], n_ctx: int | None, begin_part: BeginPart
    ) -> dict[str, list[Mark]]:
        """Ask the questions of all tasks at once; raises as `run_on_cluster`."""
        request = Request((model.path.absolute(),), tuple(tasks), (), n_ctx)

        @contextmanager
        def bar(label: str, unit: str) -> Iterator[Show]:
            yield begin_part(label, unit)

        with Results() as results:
            notes = run_on_cluster(
                request, results, self._connection, bar, gpu_layers=self._gpu_layers, loras=()
            )
            self.notes.update(dict.fromkeys(notes))
            return {one.task.name: list(one.marks) for one in answered(request, results)}
