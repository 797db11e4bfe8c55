"""Cores that this process may use, and what they can do."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgemerge.machine.control_group import processor_quota
from edgemerge.machine.sysfs import read_int, read_text

__all__ = ["count_cores", "default_threads", "online_processors", "processor_fields"]
__all__ += ["keeps_clock_low", "read_max_hz"]

_CPUS = "sys/devices/system/cpu"
_FOLLOWING_DRIVERS = ("intel_pstate", "amd-pstate-epp")


def default_threads(root: Path = Path("/")) -> int:
    """Threads to compute with: one per physical core that this process may use.

    A second thread on a core shares its arithmetic units and gains nothing. Of a processor with fast
    and slow cores, Arm's are all taken; of Intel's, only the fast ones are, as llama.cpp does
    (`cpu_get_num_math` in common/common.cpp): all wait for the slowest thread. A quota of processor
    time (cgroup) is a limit too: more threads are stopped in the middle of their work.
    """
    allowed = os.sched_getaffinity(0)
    fast = allowed & _parse_list(read_text(root / "sys/devices/cpu_core/cpus") or "")
    cores = count_cores(root, fast or allowed)
    quota = processor_quota(root)
    return max(1, min(cores, int(quota))) if quota else cores


def count_cores(root: Path, cpus: set[int]) -> int:
    """Physical cores behind some logical ones: unique (package, core) of sysfs, else their number."""
    cores: set[tuple[int, ...]] = set()
    for cpu in cpus:
        topology = root / _CPUS / f"cpu{cpu}/topology"
        core = read_int(topology / "core_id")
        if core is None:
            cores.add((cpu,))
            continue
        # On Arm, core_id starts again in every cluster where the kernel knows of clusters at all.
        package, cluster = (
            read_int(topology / f"{part}_id") or 0 for part in ("physical_package", "cluster")
        )
        cores.add((package, cluster, core))
    return len(cores)


def online_processors(root: Path) -> set[int]:
    """Logical cores that are switched on; where sysfs does not tell, those this process may use."""
    return _parse_list(read_text(root / _CPUS / "online") or "") or os.sched_getaffinity(0)


def _parse_list(text: str) -> set[int]:
    """Numbers of a kernel's list such as 0-3,8."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found.update(range(int(first), int(last or first) + 1))
    return found


def processor_fields(root: Path) -> dict[str, str]:
    """First value of each field of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def read_max_hz(root: Path) -> int | None:
    """Highest frequency of the fastest core, in hertz; sysfs has kilohertz."""
    files = (root / _CPUS).glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq")
    return max((khz * 1000 for file in files if (khz := read_int(file))), default=None)


def keeps_clock_low(root: Path) -> bool:
    """Whether the governor leaves the first core at its lowest frequency.

    The powersave of Intel's and AMD's own drivers is another: it follows the load
    (Documentation/admin-guide/pm/intel_pstate.rst and amd-pstate.rst of Linux).
    """
    folder = root / _CPUS / "cpu0/cpufreq"
    governor, driver = (read_text(folder / f"scaling_{name}") for name in ("governor", "driver"))
    return governor == "powersave" and (driver or "") not in _FOLLOWING_DRIVERS
