"""Memory of a process, as the kernel counts it, and how its threads wait."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessMemory", "read_process", "wait_briefly"]

_SPINS = "3000"  # turns of waiting before a thread sleeps


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


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Have libgomp's threads wait for each other some microseconds, then sleep; a user's own wish stands.

    Its default is to spin for milliseconds: beside one busy process, two threads on two cores fell from 130
    tokens/s to 2. With no spinning at all they gave 45, for a token has hundreds of barriers and each one
    cost a sleep. So many turns give 125 alone and 30 to 50 beside a busy process (SmolLM2-135M). libgomp
    reads this when it is loaded.
    """
    if "GOMP_SPINCOUNT" not in environment and "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # of other OpenMP libraries
        environment["GOMP_SPINCOUNT"] = _SPINS
