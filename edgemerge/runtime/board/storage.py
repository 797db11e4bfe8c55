"""Where a folder is stored, and how fast that is."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from edgemerge.machine.sysfs import read_int, read_text

__all__ = ["Disk", "Storage", "find_disk", "kind_of_disk", "measure_storage"]

_CHUNK = 4 << 20  # bytes per call; SD cards are slow with less
_MOST = 128 << 20  # bytes written in all
_SECONDS = 0.3  # for each direction
_ESCAPED = re.compile(r"\\(\d{3})")  # mountinfo writes a space as \040


@dataclass(frozen=True, slots=True)
class Disk:
    """What a file lies on.

    Attributes
    ----------
    name : str
        Of the device (mmcblk0p2), or of the file system where there is none (tmpfs, overlay).
    kind : str
        SD card, eMMC, NVMe SSD, hard disk, SSD or USB stick, virtual disk, zram (compressed memory),
        memory; else as `name`.
    """

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Speed of a folder's storage, past the page cache.

    Attributes
    ----------
    folder : Path
        What was measured.
    disk : Disk or None
        What it lies on.
    free : int or None
        Bytes that may still be written.
    write_rate, read_rate : float or None
        Bytes per second, one after another; None where it could not be measured.
    problem : str or None
        Why it could not.
    """

    folder: Path
    disk: Disk | None
    free: int | None
    write_rate: float | None = None
    read_rate: float | None = None
    problem: str | None = None


def find_disk(path: str, root: Path = Path("/")) -> Disk | None:
    """Find what an absolute path lies on, from /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    best, found = "", None
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, system = line.partition(" - ")
        words, kinds = mount.split(), system.split()
        if len(words) < 5 or len(kinds) < 2:
            continue
        point = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), words[4])
        # a later mount hides an earlier one at the same place
        if len(point) >= len(best) and (path == point or path.startswith(point.rstrip("/") + "/")):
            best, found = point, (words[2], kinds[0], kinds[1])
    if found is None:
        return None
    number, system, source = found
    device = root / "sys/dev/block" / number  # a link to .../block/mmcblk0/mmcblk0p2
    exists = os.path.exists(device)  # a container may hide it, and Path.exists raises then
    name = device.resolve().name if exists else source.rpartition("/")[2]
    if system in ("tmpfs", "ramfs"):
        return Disk(system, "memory")
    if not (exists or source.startswith("/dev/")):
        return Disk(system, system)
    return Disk(name, kind_of_disk(name, root))


def kind_of_disk(name: str, root: Path = Path("/")) -> str:
    """Say what a block device is, by its name and by what sysfs tells of it."""
    if name.startswith("mmcblk"):
        whole = re.sub(r"p\d+$", "", name)
        kind = read_text(root / f"sys/class/block/{whole}/device/type")
        return "eMMC" if kind == "MMC" else "SD card"
    if name.startswith("zram"):
        return "zram"
    if name.startswith("nvme"):
        return "NVMe SSD"
    if name.startswith(("vd", "xvd")):
        return "virtual disk"
    if name.startswith("sd"):
        whole = name.rstrip("0123456789")
        spins = read_int(root / f"sys/class/block/{whole}/queue/rotational")
        return "hard disk" if spins else "SSD or USB stick"
    return name


def measure_storage(folder: Path, root: Path = Path("/")) -> Storage:
    """Write and read a file of up to 128 MiB, for 0.3 s each; it has no name and is gone at the end.

    The page cache is passed by with O_DIRECT or, where the file system has none, emptied of the file with
    fdatasync and posix_fadvise. The bytes are random: some disks and file systems compress.
    """
    disk = find_disk(str(folder.resolve()), root)
    try:
        free = shutil.disk_usage(folder).free
        if free < 2 * _MOST:
            return Storage(folder, disk, free, problem="too little room to measure")
        # an anonymous map begins at a page, as O_DIRECT wants it
        with (
            tempfile.TemporaryFile(dir=folder, buffering=0) as file,
            mmap.mmap(-1, _CHUNK) as chunk,
        ):
            chunk.write(os.urandom(_CHUNK))
            _pass_cache_by(file.fileno())
            write_rate, n_chunks = _write(file.fileno(), chunk)
            read_rate = _read(file.fileno(), chunk, n_chunks)
    except OSError as error:
        return Storage(folder, disk, None, problem=error.strerror or str(error))
    return Storage(folder, disk, free, write_rate, read_rate)


def _pass_cache_by(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return  # tmpfs, some overlays: the cache is emptied instead


def _write(fd: int, chunk: mmap.mmap) -> tuple[float, int]:
    """Write for a while; bytes per second, and the number of chunks."""
    started = time.perf_counter()
    n_chunks = 0
    while n_chunks * _CHUNK < _MOST:
        os.pwritev(fd, [chunk], n_chunks * _CHUNK)
        n_chunks += 1
        if time.perf_counter() - started > _SECONDS:
            break
    os.fdatasync(fd)
    return n_chunks * _CHUNK / (time.perf_counter() - started), n_chunks


def _read(fd: int, chunk: mmap.mmap, n_chunks: int) -> float:
    """Read what was written, or the first of it; bytes per second."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    n_bytes = 0
    for i in range(n_chunks):
        n_bytes += os.preadv(fd, [chunk], i * _CHUNK)
        if time.perf_counter() - started > _SECONDS:
            break
    return n_bytes / (time.perf_counter() - started)
