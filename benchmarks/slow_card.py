"""A card that is slow in the ways of an SD card: a file system on a loop device that the kernel throttles.

20 MB/s one after another, and 250 writes a second, which is 1 MB/s for pages of 4 KiB. Control groups of
version 1 throttle what the kernel writes back too, if the limit is the root's. Version 2 has no such limit:
there the caller is told that it cannot be had. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BYTES_PER_SECOND = 20_000_000
WRITES_PER_SECOND = 250
SECTOR = 512  # bytes, of the kernel's counts
THROTTLE = Path("/sys/fs/cgroup/blkio")


@dataclass(frozen=True)
class Card:
    """A mounted card."""

    folder: Path
    device: str  # loop0

    def written_bytes(self) -> int:
        """Bytes that it was given to write so far, when all is written back."""
        os.sync()
        return int((Path("/sys/block") / self.device / "stat").read_text().split()[6]) * SECTOR


class NoCard(Exception):
    """No such device can be made here."""


@contextmanager
def slow_card(n_bytes: int, folder: Path, *, throttled: bool = True) -> Iterator[Card]:
    """Give a mounted card of so many bytes, whose image lies in `folder`; all is removed.

    Raises
    ------
    NoCard
        The kernel or the rights do not allow it.
    """
    if throttled and not (THROTTLE / "blkio.throttle.write_bps_device").exists():
        raise NoCard("no control group of version 1 throttles devices here")
    image = folder / "card.img"
    with image.open("wb") as file:
        file.truncate(n_bytes)
    mount = Path(tempfile.mkdtemp(prefix="card-"))
    device = ""
    try:
        device = _run("losetup", "--find", "--show", image)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        _run("mount", device, mount)
        if throttled:
            _limit(device, BYTES_PER_SECOND, WRITES_PER_SECOND)
        yield Card(mount, Path(device).name)
    finally:
        if device:
            if throttled:
                _limit(device, 0, 0)
            subprocess.run(["umount", mount], check=False, capture_output=True)
            subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)
        shutil.rmtree(mount, ignore_errors=True)
        image.unlink()


def _limit(device: str, per_second: int, writes: int) -> None:
    """Set the limits of a device; 0 for none."""
    number = (Path("/sys/block") / Path(device).name / "dev").read_text().strip()
    limits = {"read_bps": per_second, "write_bps": per_second, "write_iops": writes}
    for name, value in limits.items():
        (THROTTLE / f"blkio.throttle.{name}_device").write_text(f"{number} {value}")


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCard(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout.strip()
