"""Memory of a process, as the kernel counts it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessMemory", "read_process"]


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of one process, in bytes (proc_pid_status(5)).

    Attributes
    ----------
    rss : int
        Resident now (VmRSS): the process's own memory, `file` and shared memory.
    peak : int
        Most that was ever resident (VmHWM). Not `getrusage`: its maximum outlives exec, so it may be
        a parent's.
    file : int
        Resident pages of mapped files (RssFile): a model's weights, libraries. The kernel may drop
        them and read them again.
    """

    rss: int
    peak: int
    file: int


def read_process(pid: int | None = None) -> ProcessMemory:
    """Read what a process takes of memory, by default this one; figures are 0 where /proc does not tell."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except OSError:
        status = ""
    # "VmHWM:     1748 kB"
    sizes = {
        name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M)
    }
    return ProcessMemory(
        rss=sizes.get("VmRSS", 0),
        peak=sizes.get("VmHWM", 0),
        file=sizes.get("RssFile", 0),
    )
