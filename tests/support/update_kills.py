"""A process that runs updates in forks of itself, which kill themselves where they are told to.

`python -m tests.support.update_kills` answers lines of JSON; `Killer` is its other end. Every call by which
an update changes what is on disk is counted. At the call `at` the fork ends by SIGKILL, before it or after.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.forking import ForkingServer, answer_in_fork, forking_server

CALLS: tuple[str, ...] = (
    "replace",
    "unlink",
    "symlink",
    "mkdir",
    "fsync",
    "fdatasync",
    "ftruncate",
)
CALLS += ("posix_fallocate", "pwrite", "write")


@dataclass
class Killer:
    """The other end of the process."""

    server: ForkingServer

    def run(self, site: Path, at: int = 0, side: str = "before") -> dict[str, Any]:
        """Update a site, and end at a call; 0: at none."""
        return self.server.ask({"site": str(site), "at": at, "side": side})


@contextmanager
def kill_server() -> Iterator[Killer]:
    with forking_server("tests.support.update_kills") as server:
        yield Killer(server)


class Tripwire:
    """Counts the calls, and kills at one of them."""

    def __init__(self, at: int, side: str) -> None:
        self.n_calls = 0
        self._at, self._side = at, side
        self._lock = threading.RLock()
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **words: Any) -> Any:
            with self._lock:
                self.n_calls += 1
                is_last = self.n_calls == self._at
                if is_last and self._side == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*arguments, **words)
                if is_last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

        return call


def right_answers(model: Path) -> Mapping[str, int]:
    """Tell by the expert that a model was made of, which stands in its record."""
    record = model.with_suffix(".json")
    expert = json.loads(record.read_text())["made_of"][1]["name"] if record.exists() else "base"
    return {"disease": {"base": 20, "a.gguf": 60, "b.gguf": 150}.get(expert, 10), "general": 100}


def run(order: Mapping[str, Any]) -> dict[str, Any]:
    """Do one update; in the fork. A site called `fails` has models that fail once they serve."""
    from edgemerge.fleet.promotion import Talk
    from tests.support.updates import KnowingExaminer, folder_of, update

    path = Path(order["site"])
    fails = "fails" in path.parent.name

    class FailingExaminer(KnowingExaminer):
        def talk(self, model: Path) -> Talk:
            serves = folder_of(path).current_id() == model.stem
            if fails and serves and right_answers(model)["disease"] > 60:
                self.problems = ["llama.cpp crashed"]
            return super().talk(model)

    wire = Tripwire(order["at"], order["side"])
    report = update(path, FailingExaminer(right_answers))
    return {"outcome": report.outcome, "reason": report.reason, "calls": wire.n_calls}


def serve() -> None:
    from tests.support.updates import KnowingExaminer, better, update, write_device

    with tempfile.TemporaryDirectory() as folder:  # the kernels are loaded once for all forks
        update(write_device(Path(folder)), KnowingExaminer(better))
    for line in sys.stdin:
        answer_in_fork(json.loads(line), run)


if __name__ == "__main__":
    serve()
