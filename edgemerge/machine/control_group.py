"""The limits of this process's control group, and what they leave it of the processors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from edgemerge.machine.sysfs import read_int, read_text

__all__ = ["group_folders", "memory_limits", "processor_quota", "usable_processors"]


def group_folders(root: Path, controller: str) -> list[Path]:
    """Folders whose limits hold for this process: its control group and all that this one is in.

    Parameters
    ----------
    root : Path
        The file system's root.
    controller : str
        `memory` or `cpu`; version 1 has a tree for each, version 2 one for all (cgroups(7)).
    """
    found = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")  # "4:memory:/docker/0a1b", or "0::/user.slice"
        controllers, _, group = rest.partition(":")
        if not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the group's path is often the host's, and only the top of the tree is there.
        path = PurePosixPath(group)
        found += [top / str(part).lstrip("/") for part in (path, *path.parents)]
    return [folder for folder in found if folder.is_dir()]


def memory_limits(root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Yield each group that holds for this process and limits memory: its folder and the limit in bytes."""
    for folder in group_folders(root, "memory"):
        limit = read_int(folder / "memory.max") or read_int(folder / "memory.limit_in_bytes")
        if (
            limit is not None
        ):  # no limit is the word max in version 2, and close to 2**63 in version 1
            yield folder, limit


def processor_quota(root: Path = Path("/")) -> float | None:
    """Return how many processors this process may use on average; None where no group limits it."""
    quotas = []
    for folder in group_folders(root, "cpu"):
        words = (read_text(folder / "cpu.max") or "").split()  # version 2: "150000 100000"
        if len(words) == 2 and all(word.isdecimal() for word in words):
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = (read_int(folder / f"cpu.cfs_{part}_us") for part in ("quota", "period"))
        if quota and period and quota > 0:  # version 1: -1 is no limit
            quotas.append(quota / period)
    return min(quotas, default=None)


def usable_processors(root: Path = Path("/")) -> int:
    """Processors that this process may use: by its affinity, and by the quota of its control group."""
    allowed, quota = len(os.sched_getaffinity(0)), processor_quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))
