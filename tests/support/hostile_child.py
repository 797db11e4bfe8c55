"""Read one file after the other, each in a process of its own, and tell what it cost.

Run as `python -m tests.support.hostile_child` with a JSON list of [reader, path] on standard input; a JSON
list of [error, seconds of processor, bytes of memory] goes to standard output. The error is null where the
file is read, else "NAME: message" of what was raised. Memory is what the kernel counts as resident at the
peak beyond what the process had, which is a fork of one that has everything imported and has read nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

from edgemerge.formats import open_model
from edgemerge.formats.hub.safetensors import read_header
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.machine.process import read_process

READERS: dict[str, Callable[[str], object]] = {
    "gguf": lambda path: open_model(path).close(),
    "safetensors": read_header,
    "imatrix": lambda path: ImportanceMatrix(path).close(),
}


def measure(reader: str, path: str) -> tuple[str | None, float, int]:
    """Read a file here and now."""
    before, start, failure = read_process().rss, time.process_time(), None
    try:
        READERS[reader](path)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return failure, time.process_time() - start, read_process().peak - before


def measure_in_child(reader: str, path: str) -> tuple[str | None, float, int]:
    """Read a file in a fork, whose peak begins at what it has then."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(sink, json.dumps(measure(reader, path)).encode())
        os._exit(0)
    os.close(sink)
    with open(source, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    if not told:
        return "the process died", 0.0, 0
    failure, seconds, n_bytes = json.loads(told)
    return failure, seconds, n_bytes


if __name__ == "__main__":
    json.dump([measure_in_child(*job) for job in json.load(sys.stdin)], sys.stdout)
