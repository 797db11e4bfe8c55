"""A control group whose processes the kernel gives so much memory and no more; version 1 or 2."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest import SkipTest

from edgemerge.machine.control_group import group_folders

__all__ = ["MemoryGroup", "NoGroup"]

# File of the limit -> files that also have to be set, so that nothing is swapped out instead.
LIMITS = {
    "memory.max": {"memory.swap.max": "0"},
    "memory.limit_in_bytes": {"memory.swappiness": "0"},
}
PEAKS = ("memory.peak", "memory.max_usage_in_bytes")
# What of memory.stat the kernel cannot drop; version 1 counts the kernel's own in a file of its own.
UNDROPPABLE = ("anon", "shmem", "kernel"), ("total_rss", "total_shmem")
_numbers = itertools.count()


class NoGroup(SkipTest):
    """No group can be made on this machine; a test that meets this is skipped, and says so."""


class MemoryGroup:
    """Used as a context manager; raises NoGroup where no group can be made.

    Parameters
    ----------
    n_bytes : int
        All that the processes may have together, page cache and the kernel's own tables included.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.folder = _make_folder()

    def __enter__(self) -> Self:
        (limit,) = [name for name in LIMITS if (self.folder / name).exists()]
        (self.folder / limit).write_text(str(self.n_bytes))
        for name, value in LIMITS[limit].items():
            with suppress(OSError):
                (self.folder / name).write_text(value)
        return self

    def join(self) -> None:
        """Put this process into the group; for `preexec_fn`."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def run(self, command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess:
        """Run a command in the group, from its first instruction on."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=self.join,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
        )

    def processes(self) -> list[int]:
        """Return the numbers of the group's processes."""
        return [int(word) for word in (self.folder / "cgroup.procs").read_text().split()]

    def peak(self) -> int:
        """Return the most bytes that the group ever had, page cache included."""
        return max(_read_number(self.folder / name) for name in PEAKS)

    def undroppable(self) -> int:
        """Return the bytes that the kernel could not take back now: no pages of files."""
        stat = dict(re.findall(r"^(\w+) (\d+)$", (self.folder / "memory.stat").read_text(), re.M))
        of_kernel = _read_number(self.folder / "memory.kmem.usage_in_bytes")
        (names,) = [names for names in UNDROPPABLE if names[0] in stat]
        return of_kernel + sum(int(stat.get(name, 0)) for name in names)

    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                found = re.search(r"^oom_kill (\d+)$", (self.folder / name).read_text(), re.M)
                return int(found[1]) if found else 0
        return 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for _ in range(100):  # the last process may still be on its way out
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.02)


def _read_number(path: Path) -> int:
    """Return the number in a file, or 0 where this version of the groups has no such file."""
    return int(path.read_text()) if path.exists() else 0


def _make_folder() -> Path:
    """Make a group as near to ours as may be: version 2 allows none below one that has processes."""
    for above in group_folders(Path("/"), "memory"):
        folder = above / f"edgemerge-test-{os.getpid()}-{next(_numbers)}"
        with suppress(OSError):
            folder.mkdir()
            if any((folder / name).exists() for name in LIMITS):
                return folder
            folder.rmdir()
    raise NoGroup("NOT TESTED under a hard cap: no memory control group can be made here")
