"""A process that answers lines of JSON, each in a fork of itself, and the other end of it.

What is slow is loaded once, and a fork may end as it likes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.places import ROOT

__all__ = ["ForkingServer", "answer_in_fork", "forking_server"]


@dataclass
class ForkingServer:
    """The other end of the process."""

    process: subprocess.Popen[str]

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Send an order; return its answer, the `error` and its `kind`, or the `signal` of its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@contextmanager
def forking_server(module: str) -> Iterator[ForkingServer]:
    """Run a module that answers orders, until the end of the block."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a fork has one thread only
    with subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as process:
        yield ForkingServer(process)
        assert process.stdin is not None
        process.stdin.close()


def answer_in_fork(
    order: dict[str, Any], run: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> None:
    """Print what a fork of this process makes of an order."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = run(order)
        except BaseException as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(said) if said else {"signal": os.WTERMSIG(status)}
    print(json.dumps(answer), flush=True)
