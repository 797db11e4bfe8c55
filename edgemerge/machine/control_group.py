"""Where the limits of this process's control group lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from edgemerge.machine.sysfs import read_int, read_text

__all__ = ["group_folders", "memory_limits"]


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
