"""What a merge costs, measured from outside: a fresh process, its inputs cold where that can be had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemerge.errors import RuntimeFailure
from edgemerge.formats.adapters.reference import expand_inputs
from edgemerge.formats.gguf.split import sibling_parts
from edgemerge.runtime.bench.load_time import drop_cache
from edgemerge.runtime.complaint import PROGRESS_FD, find_complaint

__all__ = ["MergeCost", "measure_merge"]

_CHUNK = 1 << 20
_RAW_BYTES = 1 << 30  # enough to tell how fast the disk is


@dataclass(frozen=True, slots=True)
class MergeCost:
    """Time, memory and bytes of one merge.

    Attributes
    ----------
    recipe : Path
        What was merged.
    method, file_type : str
        As in `MergeReport`.
    seconds : float
        Of the merge, as it tells itself; the start of Python is not in it.
    cpu_seconds : float
        Processor time of the whole process, all threads.
    peak_rss_bytes, budget_bytes : int
        What it took of memory and what it was allowed.
    read_bytes, written_bytes, out_bytes : int
        Read over all passes and written, and the size of the result.
    workers : int
        Threads that merged.
    raw_rate : float
        Bytes per second at which one thread reads the same files and does nothing with them.
    note : str
        Why the inputs were in memory at the start; empty where they were not.
    """

    recipe: Path
    method: str
    file_type: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    budget_bytes: int
    read_bytes: int
    written_bytes: int
    out_bytes: int
    workers: int
    raw_rate: float
    note: str

    @property
    def rate(self) -> float:
        """Bytes of input per second of merging."""
        return self.read_bytes / self.seconds

    @property
    def share(self) -> float:
        """The rate as a share of `raw_rate`."""
        return self.rate / self.raw_rate


def measure_merge(
    recipe: Path,
    models: Sequence[Path],
    models_folder: Path | None = None,
    *,
    out_format: str = "gguf",
) -> MergeCost:
    """Merge into a temporary file or folder beside the recipe and remove it.

    Parameters
    ----------
    recipe : Path
        A recipe, as for `edgemerge merge`.
    models : sequence of Path
        The models that it names: files, of a split any, or folders of safetensors; with adapters or not.
    models_folder : Path, optional
        Where it finds those that it names as on the hub.
    out_format : str
        What it makes: gguf, or hf for a folder.

    Raises
    ------
    RuntimeFailure
        The merge failed; the message is its own.
    OSError
        A model cannot be read, or nothing can be written beside the recipe.
    """
    files = _files(models)
    drop_cache(files)
    raw_rate = _read_raw(files)
    note = drop_cache(files)
    with tempfile.TemporaryDirectory(prefix=".edgemerge-bench-", dir=recipe.parent) as folder:
        places = [] if models_folder is None else ["--models", str(models_folder)]
        output = Path(folder) / ("out" if out_format == "hf" else "out.gguf")
        report, cpu_seconds = _merge(recipe, output, places)
    return MergeCost(
        recipe=recipe,
        method=report["method"],
        file_type=report["file_type"],
        seconds=report["seconds"],
        cpu_seconds=cpu_seconds,
        peak_rss_bytes=report["peak_rss_bytes"],
        budget_bytes=report["budget_bytes"],
        read_bytes=report["read_bytes"],
        written_bytes=report["written_bytes"],
        out_bytes=report["out_bytes"],
        workers=report["workers"],
        raw_rate=raw_rate,
        note=note,
    )


def _files(models: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in expand_inputs(models):
        files += sorted(path.glob("*.safetensors")) if path.is_dir() else sibling_parts(path)
    return list(dict.fromkeys(files))


def _read_raw(files: Sequence[Path]) -> float:
    """Bytes per second of reading files one after another."""
    buffer = bytearray(_CHUNK)
    done = 0
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while done < _RAW_BYTES and (n_read := file.readinto(buffer)):
                done += n_read
    return done / (time.perf_counter() - start)


def _merge(recipe: Path, output: Path, places: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Run `edgemerge merge`; its report and its processor seconds."""
    command = [sys.executable, "-P", "-m", "edgemerge", "merge", str(recipe), "-o", str(output)]
    # The descriptor is this command's alone: the other one does not inherit it.
    environment = {name: value for name, value in os.environ.items() if name != PROGRESS_FD}
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as complaint:
        child = subprocess.Popen(
            [*command, *places, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=complaint,
            env=environment,
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            child.kill()
            child.wait()
            raise
        told.seek(0)
        complaint.seek(0)
        if child.returncode != 0:
            said = complaint.read().decode("utf-8", errors="replace").strip()
            raise _failure(recipe, child.returncode, said)
        return json.load(told), usage.ru_utime + usage.ru_stime


def _failure(recipe: Path, status: int, said: str) -> RuntimeFailure:
    """Make an error of what a merge said: one sentence of its own, or whatever it died of."""
    if complaint := find_complaint(said):
        sentence, detail = complaint
        return RuntimeFailure(sentence, detail=detail)
    how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    return RuntimeFailure(
        f"{recipe}: the merge died ({how}): run edgemerge merge with it by itself", detail=said
    )
