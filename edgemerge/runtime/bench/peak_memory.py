"""Where a process that runs a model has its memory: weights, KV cache, the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemerge.machine.process import read_process
from edgemerge.runtime.library import Buffers

__all__ = ["MemorySplit", "PeakMemory", "mapped_bytes"]

_HEADER = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")  # of a mapping in smaps


@dataclass(frozen=True, slots=True)
class MemorySplit:
    """Resident memory of a process at its peak, in bytes; `weights`, `kv` and `rest` add up to `peak`.

    Attributes
    ----------
    peak : int
        VmHWM of /proc.
    weights : int
        Pages of the mapped model file, and copies that llama.cpp makes of weights, as to lay them out for
        the processor.
    mapped : int
        Those of the weights that the kernel may drop when memory is short, and read again.
    kv : int
        Key-value cache, or the state of a recurrent model.
    device : int
        What llama.cpp says it took of the GPU's memory; not part of the peak.
    """

    peak: int
    weights: int
    mapped: int
    kv: int
    device: int

    @property
    def rest(self) -> int:
        """Scratch of the computation, logits, vocabulary, Python and libraries, in bytes."""
        return self.peak - self.weights - self.kv


class PeakMemory:
    """Follows the peak of this process.

    Parameters
    ----------
    paths : sequence of Path
        Files of the model.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._split: MemorySplit | None = None

    def look(self, buffers: Buffers) -> None:
        """Split the memory again if the peak has grown.

        Parameters
        ----------
        buffers : Buffers
            Of the context that holds its memory now.
        """
        peak = read_process().peak
        if self._split is not None and peak <= self._split.peak:
            return
        with open("/proc/self/smaps") as smaps:  # line by line: as one text it would raise the peak
            mapped = mapped_bytes(smaps, self._paths)
        self._split = MemorySplit(
            peak=peak,
            weights=mapped + buffers.weight_copies,
            mapped=mapped,
            kv=buffers.own_kv,
            device=buffers.device,
        )

    @property
    def split(self) -> MemorySplit:
        """The memory at the highest peak that `look` saw."""
        assert self._split is not None, "look was never called"
        return self._split


def mapped_bytes(smaps: Iterable[str], paths: Sequence[Path]) -> int:
    """Resident bytes of mapped files.

    Parameters
    ----------
    smaps : iterable of str
        Lines of /proc/PID/smaps.
    paths : sequence of Path
        The files.
    """
    wanted = {str(path.resolve()) for path in paths}
    total = 0
    is_wanted = False
    for line in smaps:
        if header := _HEADER.fullmatch(line.rstrip("\n")):
            is_wanted = header[1] in wanted
        elif is_wanted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
