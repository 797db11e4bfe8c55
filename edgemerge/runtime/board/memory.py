"""Memory that is there, and memory that this process may still take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgemerge.machine.control_group import memory_limits
from edgemerge.machine.sysfs import read_int, read_text
from edgemerge.runtime.board.storage import find_disk, kind_of_disk

__all__ = ["Memory", "Swap", "read_memory", "read_swaps"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the machine or, where it is less, of the control group; bytes.

    Attributes
    ----------
    total, available : int
        All of it, and what can be taken without swapping; caches that can be dropped are available.
    swap_total, swap_free : int
        Of the machine.
    limited : bool
        Whether a control group (a container, a systemd unit) sets the total.
    """

    total: int
    available: int
    swap_total: int
    swap_free: int
    limited: bool = False


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap area.

    Attributes
    ----------
    path : str
        Device or file.
    size : int
        Bytes.
    kind : str
        Of the disk that it lies on, as of `storage.Disk`: zram, SD card, ...
    """

    path: str
    size: int
    kind: str


def read_memory(root: Path = Path("/")) -> Memory:
    """Memory from /proc/meminfo, and the limits of the control group, versions 1 and 2.

    Figures are 0 where /proc does not tell.
    """
    fields = _numbers(root / "proc/meminfo")  # "MemTotal:       24684096 kB"
    total, available = fields.get("MemTotal:", 0) * 1024, fields.get("MemAvailable:", 0) * 1024
    of_machine, limited = total, False
    for folder, limit in memory_limits(root):
        if limit >= (of_machine or limit + 1):
            continue
        used = read_int(folder / "memory.current") or read_int(folder / "memory.usage_in_bytes")
        stat = _numbers(folder / "memory.stat")
        # the page cache counts as used, and is given back when memory is short
        cache = sum(
            stat.get(f"total_{name}", stat.get(name, 0))
            for name in ("active_file", "inactive_file")
        )
        # a group around this one may be nearly full, although its limit is larger
        total, limited = min(total or limit, limit), True
        available = max(0, min(available, limit - max(0, (used or 0) - cache)))
    swap_total, swap_free = (fields.get(name, 0) * 1024 for name in ("SwapTotal:", "SwapFree:"))
    return Memory(total, available, swap_total, swap_free, limited)


def _numbers(path: Path) -> dict[str, int]:
    """First number after each name of a file."""
    lines = (line.split() for line in (read_text(path) or "").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def read_swaps(root: Path = Path("/")) -> tuple[Swap, ...]:
    """Swap areas in use, from /proc/swaps (proc_swaps(5))."""
    found = []
    for line in (read_text(root / "proc/swaps") or "").splitlines()[1:]:
        words = line.split()
        if len(words) < 3 or not words[2].isdecimal():
            continue
        path = words[0]
        if words[1] == "file":  # Raspberry Pi OS has had /var/swap, on its card
            disk = find_disk(path, root)
            kind = disk.kind if disk is not None else "file"
        else:
            kind = kind_of_disk(path.rpartition("/")[2], root)
        found.append(Swap(path, int(words[2]) * 1024, kind))
    return tuple(found)
