"""Starts a command that stays out of everybody's way, and that ends with the process that wanted it.

    python -I -S low_priority.py PARENT COMMAND...

It gets nice 10, and the disk when nobody else wants it. PARENT is the number of the process that starts
this: the kernel sends the command SIGTERM when that ends. `child` starts this file by its path, so it imports
little.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from typing import NoReturn

__all__: list[str] = []

_NICE = 10
_PR_SET_PDEATHSIG = 1
# ioprio_set(2) has no function in libc: its number by processor, then whose priority and which.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "armv7l": 314, "armv6l": 314}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13


def main(parent: int, command: list[str]) -> NoReturn:
    """Take the place of this process by a command."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was told
        raise SystemExit(1)
    os.nice(_NICE)
    if platform.machine() in _IOPRIO_SET:
        libc.syscall(_IOPRIO_SET[platform.machine()], _WHO_PROCESS, 0, _CLASS_IDLE)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
