"""A process that runs merges in forks of itself, which kill themselves where they are told to.

`python -m tests.support.crash_server` answers lines of JSON; `tests.support.crashing` is its other end. The
kernels are loaded once, so that a run costs milliseconds instead of a second. Every call by which a merge
changes what is on disk, or reads its own output back, is counted; at the call `at`, a number or the first
of a phase, the process ends by SIGKILL: before it, after it, or when half of a write is done.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.forking import answer_in_fork

if TYPE_CHECKING:
    from edgemerge.output.report import MergeReport

WRITES = ("pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "preadv")
NAMES = ("replace", "unlink")
FOLDER = 0  # stands for its inode
ATTIC = "attic"  # where every file of the folder keeps a name, whatever becomes of the one it had

real = {name: getattr(os, name) for name in (*WRITES, *NAMES, "open")}


class Tripwire:
    """Counts the calls on one folder, tells their phase, and kills at one of them."""

    def __init__(self, folder: Path, at: int | str, side: str, *, records: bool) -> None:
        self.folder, self.at, self.side, self.records = folder, at, side, records
        self.phases: list[str] = []
        self.log: list[tuple[Any, ...]] = []  # what a power cut may undo
        self._files: dict[int, tuple[str, int]] = {}  # descriptor -> name, inode
        self._is_header_written = False
        self._lock = threading.RLock()
        os.open = self._open
        for name in WRITES:
            setattr(os, name, self._on_descriptor(name))
        for name in NAMES:
            setattr(os, name, self._on_name(name))

    def _open(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        with self._lock:
            inside = Path(os.path.abspath(path)).parent == self.folder and "dir_fd" not in more
            is_new = inside and not os.path.lexists(path)
            fd: int = real["open"](path, flags, *rest, **more)
            if inside and Path(path).name.startswith("out"):
                inode = os.fstat(fd).st_ino
                self._files[fd] = Path(path).name, inode
                if is_new:
                    os.link(path, self.folder / ATTIC / str(inode))
                    self.log.append(("create", Path(path).name, inode))
            elif Path(path) == self.folder:
                self._files[fd] = "", FOLDER
            else:
                self._files.pop(fd, None)
        return fd

    def _on_descriptor(self, name: str) -> Callable[..., Any]:
        def call(fd: int, *arguments: Any) -> Any:
            with self._lock:
                if fd not in self._files:
                    return real[name](fd, *arguments)
                file, inode = self._files[fd]
                entry: tuple[Any, ...] | None = None
                if name == "pwrite":
                    entry = ("write", inode, arguments[1], bytes(arguments[0]))
                elif name in ("ftruncate", "posix_fallocate"):
                    entry = (name, inode, arguments[-1])
                return self._step(self._phase(name, file, arguments), name, (fd, *arguments), entry)

        return call

    def _on_name(self, name: str) -> Callable[..., Any]:
        def call(*paths: Any, **more: Any) -> Any:
            if Path(os.path.abspath(paths[0])).parent != self.folder:
                return real[name](*paths, **more)
            with self._lock:
                names = [Path(path).name for path in paths]
                phase = "end" if names[0].endswith(".journal") else "rename"
                entry = (name, *names) if os.path.lexists(paths[0]) else None
                return self._step(phase, name, paths, entry)

        return call

    def _phase(self, call: str, file: str, arguments: tuple[Any, ...]) -> str:
        if not file:
            return "folder"
        if file.endswith(".journal"):
            return "journal"
        if call == "pwrite":
            if arguments[1] == 0:
                self._is_header_written = True
                return "header"
            return "blocks"
        if call == "preadv":
            return "hash" if self._is_header_written else "check"
        return "reserve" if call in ("ftruncate", "posix_fallocate") else "sync"

    def _step(
        self, phase: str, name: str, arguments: tuple[Any, ...], entry: tuple[Any, ...] | None
    ) -> Any:
        self.phases.append(phase)
        is_last = self.at in (len(self.phases), phase)
        if is_last and self.side == "before":
            self._die(phase)
        if is_last and self.side == "half" and name == "pwrite":
            fd, data, offset = arguments
            half = bytes(data)[: len(data) // 2]
            real["pwrite"](fd, half, offset)
            self.log.append(("write", self._files[fd][1], offset, half))
            self._die(phase)
        result = real[name](*arguments)
        if entry is not None:
            self.log.append(entry)
        if name in ("fsync", "fdatasync"):
            fd = arguments[0]
            self.log.append(("sync", self._files[fd][1], os.fstat(fd).st_mtime_ns))
        if is_last:
            self._die(phase)
        return result

    def _die(self, phase: str) -> None:
        if self.records:
            (self.folder / ATTIC / "log").write_bytes(pickle.dumps(self.log))
        (self.folder / ATTIC / "phase").write_text(phase)
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def merge_by(order: dict[str, Any], folder: Path) -> MergeReport:
    from edgemerge import merge
    from edgemerge.recipe.recipe import make_recipe

    given = dict(order["recipe"])
    models = [(path, None) for path in given.pop("models")]
    recipe = make_recipe(given.pop("method"), models, **given)
    return merge(recipe, folder / "out.gguf", **order["options"])


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Do one merge; in the fork."""
    folder = Path(order["folder"])
    wire = Tripwire(folder, order["at"], order["side"], records=order["records"])
    report = merge_by(order, folder)
    return {
        "resumed": report.resumed_tensors,
        "damaged": report.damaged_tensors,
        "tensors": report.tensors,
        "notes": report.notes,
        "sha256": report.sha256,
        "phases": wire.phases,
    }


def serve() -> None:
    from edgemerge import budget
    from edgemerge.output import journal

    budget.TARGET_ELEMENTS = 4096  # many blocks, and tensors that several workers share
    journal.BATCH_SECONDS, journal.BATCH_BYTES = 0.002, 1
    loaded: set[str] = set()
    for line in sys.stdin:
        order = json.loads(line)
        kernels = repr([order["recipe"][key] for key in ("method", "out_type")])
        if kernels not in loaded:  # once for all forks
            with tempfile.TemporaryDirectory() as folder:
                merge_by(order, Path(folder))
            loaded.add(kernels)
        answer_in_fork(order, run)


if __name__ == "__main__":
    serve()
