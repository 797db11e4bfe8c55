"""Where a process that runs a model has its memory: weights, KV cache, the rest."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemerge.process import read_process
from edgemerge.runtime.library import Library

__all__ = ["MemorySplit", "PeakMemory", "mapped_bytes"]

# "load_tensors:   CPU_REPACK model buffer size =    56.95 MiB": place, kind, size
_BUFFER = re.compile(r": +(\S+) +(model|KV|RS|compute|output|LoRA) buffer size = +([0-9.]+) MiB")
_OF_CONTEXT = {"KV", "RS", "compute", "output"}  # told anew with each context
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
    """Follows the peak of this process; made before the model is loaded.

    llama.cpp tells where its buffers are in its log alone, so this listens in on it; use it in a `with`
    statement.

    Parameters
    ----------
    library : Library
        llama.cpp in this process.
    paths : sequence of Path
        Files of the model.
    """

    def __init__(self, library: Library, paths: Sequence[Path]) -> None:
        self._library = library
        self._paths = paths
        self._buffers: list[tuple[str, str, int]] = []  # place, kind, bytes
        self._split: MemorySplit | None = None

        def listen(level: int, text: bytes, user_data: object) -> None:
            if found := _BUFFER.search(text.decode("utf-8", errors="replace")):
                self._buffers.append((found[1], found[2], round(float(found[3]) * 2**20)))
            library.callback(level, text, user_data)  # type: ignore[operator]

        self._callback = library.api.llama_log_callback(listen)  # C holds the pointer only

    def __enter__(self) -> PeakMemory:
        self._library.api.llama_log_set(self._callback, ctypes.c_void_p(0))
        return self

    def __exit__(self, *_: object) -> None:
        self._library.api.llama_log_set(self._library.callback, ctypes.c_void_p(0))

    def start_context(self) -> None:
        """Forget the buffers of the last context, before the next is made."""
        self._buffers = [buffer for buffer in self._buffers if buffer[1] not in _OF_CONTEXT]

    def look(self) -> None:
        """Split the memory again if the peak has grown; called while a context holds its memory."""
        peak = read_process().peak
        if self._split is not None and peak <= self._split.peak:
            return
        with open("/proc/self/smaps") as smaps:  # line by line: as one text it would raise the peak
            mapped = mapped_bytes(smaps, self._paths)
        copies = sum(
            size
            for place, kind, size in self._buffers
            if kind in ("model", "LoRA") and _is_own(place)
        )
        self._split = MemorySplit(
            peak=peak,
            weights=mapped + copies,
            mapped=mapped,
            kv=sum(
                size
                for place, kind, size in self._buffers
                if kind in ("KV", "RS") and _is_own(place)
            ),
            device=sum(size for place, _, size in self._buffers if not place.startswith("CPU")),
        )

    @property
    def split(self) -> MemorySplit:
        """The memory at the highest peak that `look` saw."""
        assert self._split is not None, "look was never called"
        return self._split


def _is_own(place: str) -> bool:
    """Whether a buffer is memory of the process: not the GPU's, and not the mapped file."""
    return place.startswith("CPU") and not place.endswith("_Mapped")


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
