"""What a merge tells about itself: one dataclass, as JSON and as a few lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgemerge.machine.process import read_process
from edgemerge.sizes import format_count, format_size

__all__ = ["FileReport", "MergeReport", "peak_rss_bytes"]


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file of an output."""

    path: Path
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Figures of one finished merge; the field names are the contract of `merge --json`."""

    output: Path  # what to load: of a split, its first file
    out_bytes: int  # of all files
    method: str
    models: tuple[str, ...]  # names, the base first
    file_type: str
    type_bytes: Mapping[str, int]  # ggml type -> bytes of its tensors in the output
    tensors: int
    elements: int
    seconds: float
    budget_bytes: int
    peak_rss_bytes: int  # of the process since it started
    read_bytes: int
    written_bytes: int
    passes: int  # most reads of one tensor's inputs
    workers: int
    resumed_tensors: int  # taken over from an interrupted run
    damaged_tensors: int  # of an interrupted run, found damaged and made again
    sha256: str  # of the output file; of a split, of its files one after the other
    notes: tuple[str, ...]
    files: tuple[FileReport, ...] = ()  # of a split, in order

    def as_json(self) -> dict[str, Any]:
        """Return plain types only."""
        files = [{**asdict(file), "path": str(file.path)} for file in self.files]
        return asdict(self) | {"output": str(self.output), "files": files}

    def lines(self) -> Iterator[str]:
        """Say it to people."""
        yield f"{self.output}  {format_size(self.out_bytes)}, {self.file_type}, {self.method}"
        resumed = f", {self.resumed_tensors} taken over" if self.resumed_tensors else ""
        if self.damaged_tensors:
            resumed += f", {self.damaged_tensors} found damaged and made again"
        yield (
            f"  {self.tensors} tensors{resumed}, {format_count(self.elements)} parameters "
            f"in {self.seconds:.1f} s with {self.workers} worker{'s' * (self.workers > 1)}"
        )
        yield (
            f"  memory {format_size(self.peak_rss_bytes)} at peak "
            f"of {format_size(self.budget_bytes)}, read {format_size(self.read_bytes)}, "
            f"wrote {format_size(self.written_bytes)}"
        )
        yield f"  sha256 {self.sha256}{' of the files one after the other' if self.files else ''}"
        for file in self.files:
            yield f"  {file.path.name}  {format_size(file.n_bytes)}, sha256 {file.sha256}"
        for note in self.notes:
            yield f"  note: {note}"


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, in bytes; 0 where /proc does not tell."""
    return read_process().peak
