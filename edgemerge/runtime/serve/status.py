"""How the server is: what /health tells and what /metrics measures at the moment."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from edgemerge.machine.process import read_process
from edgemerge.runtime.board.device import read_memory, read_temperature, read_throttling
from edgemerge.runtime.serve.active_request import Run
from edgemerge.runtime.serve.metrics import Gauge, Metrics
from edgemerge.runtime.serve.queue import Queue
from edgemerge.runtime.serve.store import ModelStore

__all__ = ["Status"]

_BOARD_SECONDS = 2.0  # the board is read no more often: a Raspberry Pi's firmware takes a process


class Status:
    """Live figures of a server.

    Parameters
    ----------
    models : ModelStore
        Its models.
    queue : Queue
        The line in front of them.
    logs_prompts : bool
        Whether what people write is kept in a log, which they are told.

    Attributes
    ----------
    metrics : Metrics
        Its counters.
    runs : set of Run
        The requests that are answered, or wait for that.
    """

    def __init__(self, models: ModelStore, queue: Queue, *, logs_prompts: bool = False) -> None:
        self._logs_prompts = logs_prompts
        self.metrics = Metrics(self._gauges)
        self.runs: set[Run] = set()
        self._models = models
        self._queue = queue
        self._started = time.monotonic()
        self._board: dict[str, Any] = {}
        self._board_read = float("-inf")

    def brief(self) -> dict[str, Any]:
        """Tell what anybody may know."""
        status = "stopping" if self._queue.is_closed else "ok"
        return {
            "status": status,
            "version": version("edgemerge"),
            "logs_prompts": self._logs_prompts,
        }

    def full(self) -> dict[str, Any]:
        """Tell what the page at / shows; figures are null where nothing tells them."""
        board, metrics = self._read_board(), self.metrics
        models = [asdict(state) for state in self._models.states()]
        speed = sum(run.tokens_per_second or 0.0 for run in self.runs)
        return {
            **self.brief(),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "queue": {
                "running": self._queue.running,
                "waiting": self._queue.waiting,
                "limit": self._queue.limit,
            },
            "models": [{**model, "loaded": model["state"] == "loaded"} for model in models],
            "memory": {
                "rss": self._read_memory(),
                "limit": self._models.budget,
                "available": board["available"],
            },
            "temperature_c": board["temperature"],
            "throttled": board["throttled"],
            "tokens_per_second": _rounded(speed or metrics.tokens_per_second),
            "time_to_first_token_s": _rounded(metrics.time_to_first_token),
            "requests": {
                "answered": metrics.answered,
                "refused": metrics.refused,
                "failed": metrics.failed,
            },
        }

    def _read_board(self) -> dict[str, Any]:
        now = time.monotonic()
        if now - self._board_read > _BOARD_SECONDS:
            throttling = read_throttling()
            self._board = {
                "available": read_memory().available,
                "temperature": read_temperature(),
                "throttled": None if throttling is None else throttling.active,
            }
            self._board_read = now
        return self._board

    def _read_memory(self) -> int:
        """Resident bytes of the server and of its models' processes."""
        return read_process().rss + sum(read_process(pid).rss for pid in self._models.pids)

    def _gauges(self) -> dict[str, Gauge]:
        board, states = self._read_board(), self._models.states()
        gauges: dict[str, Gauge] = {
            "edgemerge_requests_running": ("Requests that have a turn", self._queue.running),
            "edgemerge_queue_length": ("Requests that wait for their turn", self._queue.waiting),
            "edgemerge_models_loaded": ("Models in memory", len(self._models.loaded)),
            "edgemerge_model_loading": (
                "1 while a model is being loaded",
                {state.id: float(state.state == "loading") for state in states},
            ),
            "edgemerge_model_starts": (
                "Processes that were started with a model",
                {state.id: state.starts for state in states},
            ),
            "edgemerge_model_crashes": (
                "Processes of a model that ended by themselves",
                {state.id: state.crashes for state in states},
            ),
            "edgemerge_resident_memory_bytes": ("Memory of all processes", self._read_memory()),
            "edgemerge_memory_limit_bytes": ("Memory it may take", self._models.budget),
        }
        if board["temperature"] is not None:
            text = "Hottest sensor of the processor"
            gauges["edgemerge_temperature_celsius"] = (text, board["temperature"])
        if board["throttled"] is not None:
            text = "1 while the board slows the processor down"
            gauges["edgemerge_throttled"] = (text, float(board["throttled"]))
        return gauges


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
