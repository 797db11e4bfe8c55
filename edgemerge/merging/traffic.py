"""What workers tell of their work: bytes that went by, and checksums of the parts that they made."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from edgemerge.errors import Stopped
from edgemerge.output.checksums import RowChecksum, TensorResult, join_checksums

__all__ = ["PartResult", "Traffic", "join_parts"]


class Traffic:
    """Bytes that workers read and wrote so far, and the event that stops them, which may be others' too."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.read = 0
        self.written = 0
        self.stop = stop or threading.Event()
        self._lock = threading.Lock()

    def add(self, n_read: int, n_written: int) -> None:
        """Count bytes. Raises `Stopped` where `stop` is set."""
        with self._lock:
            self.read += n_read
            self.written += n_written
        if self.stop.is_set():
            raise Stopped


@dataclass(frozen=True, slots=True)
class PartResult:
    """Checksums of what one worker read of each input, and of what it wrote."""

    inputs: tuple[RowChecksum, ...]
    output: RowChecksum


def join_parts(parts: Sequence[PartResult]) -> TensorResult:
    """Join the checksums of all workers of one tensor."""
    inputs = zip(*(part.inputs for part in parts), strict=True)
    return TensorResult(
        tuple(map(join_checksums, inputs)), join_checksums([part.output for part in parts])
    )
