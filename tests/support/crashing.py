"""Merges that are killed at any of their steps, or lose what a power cut would, and run again."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.crash_server import ATTIC, FOLDER
from tests.support.forking import ForkingServer, forking_server
from tests.support.small_models import wide_tensors, write_gguf

SECTOR = 512


@dataclass
class Crasher:
    """The other end of `tests.support.crash_server`."""

    server: ForkingServer
    n_runs: int = field(default=0)

    def run(
        self,
        case: Case,
        *,
        at: int | str = 0,
        side: str = "before",
        records: bool = False,
        recipe: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Run a case, and end it at a call, or the first of a phase; 0: at none."""
        self.n_runs += 1
        (case.folder / ATTIC).mkdir(exist_ok=True)
        order = {
            "folder": str(case.folder),
            "recipe": {**case.recipe, **(recipe or {})},
            "options": {**case.options, **options},
            "at": at,
            "side": side,
            "records": records,
        }
        answer = self.server.ask(order)
        assert "error" not in answer or "kind" in answer
        return answer


@contextmanager
def crash_server() -> Iterator[Crasher]:
    with forking_server("tests.support.crash_server") as server:
        yield Crasher(server)


@dataclass
class Case:
    """One merge in a folder of its own."""

    folder: Path
    recipe: dict[str, Any]
    options: dict[str, Any]

    def outputs(self) -> dict[str, bytes]:
        """Everything but the attic."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}

    def phase(self) -> str:
        """In which phase the last run was killed."""
        return (self.folder / ATTIC / "phase").read_text()

    def clear(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic", "base": "base"},
    "ties": {"method": "ties", "base": "base", "parameters": {"density": 0.5}},
    "della": {"method": "della", "base": "base", "parameters": {"density": 0.5, "epsilon": 0.1}},
    "hierarchical": {"method": "hierarchical", "base": "base"},
    "convert": {"method": "passthrough", "models": ["a"]},
}
TYPES = ("Q8_0", "F16", "Q4_K_M")
KINDS = [*METHODS, "split", "force", "split force"]


def make_case(kind: str, folder: Path, models: Mapping[str, str]) -> Case:
    """Describe a merge, in a new folder."""
    (folder / kind).mkdir(parents=True)
    given = dict(METHODS.get(kind, METHODS["linear"]))
    if "base" in given:
        given["base"] = models["base"]
    given["models"] = [models[name] for name in given.get("models", ["a", "b"])]
    given["out_type"] = TYPES[len(kind) % len(TYPES)]
    options: dict[str, Any] = {"threads": 2}
    if "split" in kind:
        options["split_bytes"] = 30_000
    if "force" in kind:
        options["force"] = True
    return Case(folder / kind, given, options)


def write_models(folder: Path) -> dict[str, str]:
    """Write a base and two fine-tunes of it."""
    base = wide_tensors(0)
    tensors = {"base": base, "a": wide_tensors(1, base), "b": wide_tensors(2, base)}
    return {name: str(write_gguf(folder / f"{name}.gguf", tensors[name])) for name in tensors}


# -- a power cut ---------------------------------------------------------------------------------------


def lose_power(case: Case, before: Mapping[str, int], rng: random.Random) -> None:
    """Leave of a killed run what a disk might: of what no sync covers, some, torn or not.

    `before` are the names in the folder and their inodes, as they were when the run began. Files get their
    names, and lose them, in order but late; their bytes are written in any order, sector by sector.
    """
    attic = case.folder / ATTIC
    names, files = _replay(pickle.loads((attic / "log").read_bytes()), before, attic, rng)
    for path in case.folder.iterdir():
        if path.is_file():
            path.unlink()
    for name, inode in names.items():
        if inode in files:
            files[inode].write_to(attic / str(inode))
        os.link(attic / str(inode), case.folder / name)


@dataclass
class _File:
    """What is on the medium, and what is only in the cache."""

    content: bytearray = field(default_factory=bytearray)
    mtime_ns: int | None = None
    waiting: list[tuple[Any, ...]] = field(default_factory=list)

    def apply(self, entry: tuple[Any, ...], rng: random.Random | None = None) -> None:
        """Do what an entry says; with `rng`, only as much of it as had come to the medium."""
        kind, _, *rest = entry
        if kind == "ftruncate":
            del self.content[rest[0] :]
        if kind in ("ftruncate", "posix_fallocate"):
            self.content += bytes(max(0, rest[0] - len(self.content)))
            return
        offset, data = rest
        for start in range(0, len(data), SECTOR):
            if rng is None or rng.random() < 0.7:
                piece = data[start : start + SECTOR]
                at = offset + start
                self.content += bytes(max(0, at + len(piece) - len(self.content)))
                self.content[at : at + len(piece)] = piece

    def write_to(self, path: Path) -> None:
        path.write_bytes(self.content)
        if self.mtime_ns is not None:
            os.utime(path, ns=(self.mtime_ns, self.mtime_ns))


def _replay(
    log: list[tuple[Any, ...]], before: Mapping[str, int], attic: Path, rng: random.Random
) -> tuple[dict[str, int], dict[int, _File]]:
    files: dict[int, _File] = {}
    moves: list[tuple[Any, ...]] = []
    n_durable = 0
    for entry in log:
        kind, *rest = entry
        if kind in ("create", "replace", "unlink"):
            moves.append(entry)
        elif kind == "sync" and rest[0] == FOLDER:
            n_durable = len(moves)
        else:
            file = files.setdefault(rest[0], _File(_first_content(rest[0], log, attic)))
            if kind != "sync":
                file.waiting.append(entry)
                continue
            for waiting in file.waiting:
                file.apply(waiting)
            file.waiting.clear()
            file.mtime_ns = rest[1]
    for file in files.values():
        for waiting in file.waiting:
            if rng.random() < 0.6:
                file.apply(waiting, rng)
    names = dict(before)
    for kind, name, *rest in moves[: rng.randint(n_durable, len(moves))]:
        if kind == "create":
            names[name] = rest[0]
        elif kind == "unlink":
            names.pop(name, None)
        elif name in names:
            names[rest[0]] = names.pop(name)
    return names, files


def _first_content(inode: int, log: list[tuple[Any, ...]], attic: Path) -> bytearray:
    """Return what a file held before the run: nothing if the run made it."""
    is_new = any(entry[0] == "create" and entry[2] == inode for entry in log)
    return bytearray() if is_new else bytearray((attic / f"{inode}.before").read_bytes())


def remember(case: Case) -> dict[str, int]:
    """Keep what is in the folder before a run, for `lose_power`; return its names and inodes."""
    attic = case.folder / ATTIC
    attic.mkdir(exist_ok=True)
    names = {path.name: path.stat().st_ino for path in case.folder.iterdir() if path.is_file()}
    for name, inode in names.items():
        shutil.copyfile(case.folder / name, attic / f"{inode}.before")
        if not (attic / str(inode)).exists():
            os.link(case.folder / name, attic / str(inode))
    return names
