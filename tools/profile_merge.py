#!/usr/bin/env python3
"""Profile one merge: where its time goes.

    tools/profile_merge.py -m ties --base base.gguf a.gguf b.gguf -o out.gguf --threads 1
    tools/profile_merge.py RECIPE.yml -o out.gguf --json

Takes what `edgemerge merge` takes and runs it in this process, with a stopwatch around every function that
reads, decodes, computes, encodes, checks, writes or waits. A stopwatch costs about a microsecond a call, of
which a block of rows makes some twenty. Sections exclude each other: what is left of a worker's time is
Python between the kernels. With one worker (`--threads 1`) the table says what each step costs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

PROCESS_CPU = time.process_time()  # so far: the interpreter's own start
STARTED = time.perf_counter()

START, IMPORTS, PLAN = "start of Python", "imports", "plan, headers, report"
LOAD, READ, DECODE, MERGE = "load kernels", "read", "decode", "merge arithmetic"
ENCODE, CHECK, WRITE, BETWEEN = "encode", "CRC-32", "write", "Python between kernels"
WAIT, ADVISE, HASH, SYNC = "wait for each other", "page-cache hints", "SHA-256", "reserve and sync"
SECTIONS = [START, IMPORTS, PLAN, LOAD, READ, DECODE, MERGE, ENCODE]
SECTIONS += [CHECK, WRITE, ADVISE, BETWEEN, WAIT, HASH, SYNC]
MAIN, WORKER, JOURNAL = "main", "worker", "journal"
INPUT_OUTPUT = (READ, WRITE, SYNC)
SYSTEM_CALLS = {
    READ: ("pread", "preadv", "read", "readv"),
    WRITE: ("pwrite", "pwritev", "write", "writev", "copy_file_range", "sendfile"),
    SYNC: ("fsync", "fdatasync", "posix_fallocate", "replace"),
    ADVISE: ("posix_fadvise",),
}


@dataclass
class Spent:
    """What one section took, in one kind of thread, without the sections inside it."""

    section: str
    thread: str  # main, worker, or journal, whose disk nobody waits for until the end
    calls: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Stopwatch:
    """Adds up exclusive times per section, over all threads."""

    def __init__(self) -> None:
        self.spent: dict[tuple[str, str], Spent] = {}
        self.first_write: float | None = None  # when the first write was done
        self._open = threading.local()
        self._lock = threading.Lock()

    def time(self, section: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.call(section, function, *args, **kwargs)

        return timed

    def call(self, section: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function on the clock."""
        outer = getattr(self._open, "inner", None)
        self._open.inner = inner = [0.0, 0.0]  # wall and CPU seconds of the sections inside
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            cpu, now = time.thread_time() - cpu, time.perf_counter()
            wall = now - wall
            self._open.inner = outer
            if outer is not None:
                outer[0] += wall
                outer[1] += cpu
            self._add(section, wall - inner[0], cpu - inner[1], now)

    def _add(self, section: str, wall: float, cpu: float, now: float) -> None:
        thread = _kind_of(threading.current_thread())
        with self._lock:
            entry = self.spent.setdefault((section, thread), Spent(section, thread))
            entry.calls += 1
            entry.wall_s += wall
            entry.cpu_s += cpu
            if section == WRITE and thread == WORKER and self.first_write is None:
                self.first_write = now


def _kind_of(thread: threading.Thread) -> str:
    if thread is threading.main_thread():
        return MAIN
    return JOURNAL if "journal" in thread.name else WORKER


# -- stopwatches everywhere ------------------------------------------------------------------------------


def attach(watch: Stopwatch) -> None:
    """Put stopwatches around what edgemerge calls."""
    from edgemerge.formats.quants.codec import Codec
    from edgemerge.native.kernel import Kernel
    from edgemerge.output import checksums

    for section, names in SYSTEM_CALLS.items():
        for name in names:
            setattr(os, name, watch.time(section, getattr(os, name)))
    checksums.crc32 = watch.time(CHECK, checksums.crc32)  # type: ignore[attr-defined]
    new_hash = hashlib.sha256
    hashlib.sha256 = lambda *data, **options: TimedHash(watch, new_hash(*data, **options))  # type: ignore[assignment]
    for section, owner, name in (
        (WAIT, threading.Condition, "wait"),
        (BETWEEN, threading.Thread, "run"),
        (DECODE, Codec, "decode"),  # F32 has no kernel
        (ENCODE, Codec, "encode"),
        (LOAD, Kernel, "_load"),
    ):
        setattr(owner, name, _timed_method(watch, section, getattr(owner, name)))
    join = threading.Thread.join

    def timed_join(thread: threading.Thread, *args: Any) -> None:
        watch.call(SYNC if _kind_of(thread) == JOURNAL else WAIT, join, thread, *args)

    threading.Thread.join = timed_join  # type: ignore[assignment, method-assign]
    call = Kernel.__call__

    def timed(kernel: Any, *args: Any) -> Any:
        return watch.call(_section_of(kernel._name), call, kernel, *args)

    Kernel.__call__ = timed  # type: ignore[assignment, method-assign]


def _section_of(kernel: str) -> str:
    return {"decode": DECODE, "encode": ENCODE}.get(kernel.partition("_")[0], MERGE)


class TimedHash:
    """A hash whose updates are timed."""

    def __init__(self, watch: Stopwatch, inner: Any) -> None:
        self._inner = inner
        self.update = watch.time(HASH, inner.update)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _timed_method(watch: Stopwatch, section: str, method: Callable[..., Any]) -> Any:
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watch.call(section, method, self, *args, **kwargs)

    return timed


# -- one merge -------------------------------------------------------------------------------------------


def seconds_before() -> float:
    """Wall seconds from the start of this process to the start of this file."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
        now = float(uptime.read().split()[0])
    return max(0.0, now - ticks / os.sysconf("SC_CLK_TCK") - (time.perf_counter() - STARTED))


def profile(arguments: list[str]) -> dict[str, Any]:
    """Merge as `edgemerge merge ARGUMENTS --json` does; return its report, and the profile."""
    before = seconds_before()
    watch = Stopwatch()
    watch.spent[START, MAIN] = Spent(START, MAIN, 1, before, PROCESS_CPU)
    command_line = watch.call(IMPORTS, importlib.import_module, "edgemerge.cli")
    command_line.settle_process()
    for module in ("edgemerge.cli.merge", "edgemerge.merging.run", "edgemerge.merging.workers"):
        watch.call(IMPORTS, importlib.import_module, module)

    attach(watch)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        words = ["merge", *arguments, "--json"]
        watch.call(PLAN, command_line.make_app(["merge"]), args=words, standalone_mode=False)
    report = json.loads(output.getvalue())
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = before + time.perf_counter() - STARTED
    return {
        "report": report,
        "wall_s": wall,
        "cpu_s": time.process_time(),
        "first_block_s": watch.first_write and before + watch.first_write - STARTED,
        "io_share": _io_seconds(watch, report["workers"]) / wall,
        "children_cpu_s": children.ru_utime + children.ru_stime,  # of compilers
        "children_peak_mib": children.ru_maxrss / 1024,
        "sections": [asdict(spent) for spent in watch.spent.values()],
    }


def _io_seconds(watch: Stopwatch, workers: int) -> float:
    """Wall seconds in which reads, writes and syncs delayed the merge: per worker, and those of the end."""
    seconds = dict.fromkeys((MAIN, WORKER, JOURNAL), 0.0)
    for spent in watch.spent.values():
        if spent.section in INPUT_OUTPUT:
            seconds[spent.thread] += spent.wall_s
    return seconds[WORKER] / workers + seconds[MAIN]


def add_up(sections: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Add up a profile's `cpu_s` or `wall_s` per section, over all threads."""
    total = dict.fromkeys(SECTIONS, 0.0)
    for spent in sections:
        total[spent["section"]] += spent[kind]
    return total


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0
    as_json = "--json" in arguments
    found = profile([word for word in arguments if word != "--json"])
    if as_json:
        print(json.dumps(found))
        return 0
    cpu, wall = (add_up(found["sections"], kind) for kind in ("cpu_s", "wall_s"))
    print(f"{'':24} {'CPU s':>8} {'wall s':>8}")
    for section in SECTIONS:
        print(f"{section:24} {cpu[section]:8.3f} {wall[section]:8.3f}")
    print(f"{'in all':24} {found['cpu_s']:8.3f} {found['wall_s']:8.3f}")
    print(f"first block after {found['first_block_s']:.2f} s, I/O {100 * found['io_share']:.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
