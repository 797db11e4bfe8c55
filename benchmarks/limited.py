"""Run a command in a control group of so much memory and no swap, and see what it took.

The page cache counts: a file that a command reads or writes is in its group, up to the limit. There the
kernel drops what it can, so the group's peak says little. What cannot be dropped says how small a board may
be. It is sampled. A command starts with none of its files in the cache, as after switching the board on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measure import ROOT

sys.path.insert(0, str(ROOT))
from edgemerge.machine.process import read_process
from tests.support.memory_group import MemoryGroup

INTERVAL = 0.01  # seconds between two looks
MIB = 1 << 20


@dataclass
class Taken:
    """What one command took in its group; sizes in bytes."""

    limit: int
    peak: int = 0  # of the group, page cache included
    undroppable: int = 0  # most of it that the kernel could not take back, as sampled
    processes: dict[int, int] = field(default_factory=dict)  # pid -> most that was resident
    wall_s: float = 0.0
    killed: bool = False  # by the kernel, for want of memory
    code: int = 0
    output: str = ""

    @property
    def works(self) -> bool:
        """Whether it came to its end."""
        return self.code == 0 and not self.killed

    def as_json(self) -> dict[str, object]:
        """Return all but the output."""
        largest = sorted(self.processes.values(), reverse=True)
        kept = {key: value for key, value in vars(self).items() if key != "output"}
        return {**kept, "processes": largest, "works": self.works}


def run_limited(
    command: Sequence[str | Path],
    limit: int,
    files: Iterable[Path] = (),
    *,
    use: Callable[[str], None] | None = None,
    environment: dict[str, str] | None = None,
) -> Taken:
    """Run a command to its end in a group of `limit` bytes.

    Parameters
    ----------
    command : sequence of str or Path
        Program and arguments.
    limit : int
        Bytes.
    files : iterable of Path
        Files and folders that are dropped from the page cache before; they need not be there.
    use : callable, optional
        Of a server: called with its first line of output; when it returns, the server is sent SIGTERM.
    environment : dict of str, optional
        Added to this process's.

    Raises
    ------
    NoGroup
        No group can be made here.
    """
    drop_from_cache(files)
    with MemoryGroup(limit) as group:
        taken = Taken(limit)
        started = time.monotonic()
        child = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=group.join,
            env={**os.environ, **(environment or {})},
        )
        watcher = threading.Thread(target=_watch, args=(group, child, taken))
        watcher.start()
        try:
            if use is not None and child.stdout is not None:
                _use(child, use)
            taken.output = child.communicate()[0]
        finally:
            child.kill()
            watcher.join()
        taken.wall_s = time.monotonic() - started
        taken.code, taken.peak = child.returncode, group.peak()
        taken.killed = group.kills() > 0
    return taken


def _use(server: subprocess.Popen[str], use: Callable[[str], None]) -> None:
    assert server.stdout is not None
    first = server.stdout.readline()
    if server.poll() is None and first:
        use(first)
    server.send_signal(signal.SIGTERM)


def _watch(group: MemoryGroup, child: subprocess.Popen[str], taken: Taken) -> None:
    while child.poll() is None:
        taken.undroppable = max(taken.undroppable, group.undroppable())
        for pid in group.processes():
            peak = read_process(pid).peak
            taken.processes[pid] = max(peak, taken.processes.get(pid, 0))
        time.sleep(INTERVAL)


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Write all to the disk, then drop these files and folders from the page cache."""
    os.sync()
    for path in paths:
        for file in (path, *path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
