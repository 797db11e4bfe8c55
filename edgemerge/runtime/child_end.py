"""What the end of a process that ran llama.cpp means: who is to blame, and how to say it."""

from __future__ import annotations

import signal

__all__ = ["describe_end", "is_crash"]

# A failed assertion, or a fault in the code. SIGBUS is none: the system sends it where a page of a mapped
# file cannot be read from the disk.
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE)


def is_crash(status: int | None) -> bool:
    """Tell whether llama.cpp ended its own process; else somebody or the system did, or Python failed."""
    return status is not None and -status in CRASHES


def describe_end(status: int | None) -> str:
    """Say how a process ended, to go on after its name."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = {"SIGKILL": " (memory may be short)", "SIGBUS": " (the disk may fail)"}.get(name, "")
        return f"ended by {name}{hint}"
    return f"ended with status {status}"
