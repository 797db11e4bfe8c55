"""The files that may be merged and asked: those in the folders that the operator named, and no others.

A browser never names a path. It sends a key of a list that was made here, and what is no key is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgemerge.errors import EdgemergeError
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.model import GgufFile, parts_of
from edgemerge.recipe.values import is_utf8
from edgemerge.runtime.serve.errors import Refusal

__all__ = ["Offer", "Offers"]

KINDS = ("model", "delta")
_MAX_FILES = 500  # of one folder: a folder of downloads is not worth reading in full
_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Offer:
    """A file that may be taken.

    Attributes
    ----------
    key : str
        What the page calls it: the folder's number and the file's name.
    name : str
        What people call it.
    path : Path
        Where it is.
    kind : str
        model, delta or questions.
    n_bytes : int
        Size of the file.
    architecture : str
        Of a model or delta.
    base : str
        Name of a delta's base.
    """

    key: str
    name: str
    path: Path
    kind: str
    n_bytes: int
    architecture: str = ""
    base: str = ""

    def as_json(self) -> dict[str, Any]:
        """Tell all but the path."""
        return {
            "key": self.key,
            "name": self.name,
            "kind": self.kind,
            "bytes": self.n_bytes,
            "architecture": self.architecture,
            "base": self.base,
        }


class Offers:
    """What some folders hold; each file is read once, and again when it has changed.

    Parameters
    ----------
    folders : sequence of Path
        Folders with GGUF files and files of questions; one that is missing has none.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self._known: dict[tuple[Path, int, int], Offer | None] = {}

    def read(self, names: Mapping[str, str]) -> list[Offer]:
        """List the files, sorted by folder and name.

        Parameters
        ----------
        names : mapping of str to str
            What people call a file, by its name without `.gguf`, where that says nothing to them.
        """
        found, known = [], {}
        for number, path in self._paths():
            try:
                facts = path.stat()
            except OSError:  # gone since
                continue
            state = (path, facts.st_size, facts.st_mtime_ns)
            if state not in self._known:
                self._known[state] = _read(f"{number}/{path.name}", path, facts.st_size)
            known[state] = offer = self._known[state]
            if offer is not None:
                found.append(replace(offer, name=names.get(path.stem, offer.name)))
        self._known = known
        return found

    def take(self, key: str, kinds: Sequence[str] = KINDS) -> Offer:
        """Return the file of a key.

        Raises
        ------
        Refusal
            404: there is none, or it is of another kind.
        """
        for offer in self.read({}):
            if offer.key == key and offer.kind in kinds:
                return offer
        raise Refusal(404, f"there is no file {key[:100]!r} to take: reload the list")

    def _paths(self) -> Iterator[tuple[int, Path]]:
        for number, folder in enumerate(self.folders):
            for pattern in ("*.gguf", "*.jsonl"):
                for path in sorted(folder.glob(pattern))[:_MAX_FILES]:
                    if path.is_file() and is_utf8(path.name):  # JSON spells no other
                        yield number, path


def _read(key: str, path: Path, n_bytes: int) -> Offer | None:
    """Look into a file; None for what can be neither merged nor asked."""
    if path.suffix == ".jsonl":
        return Offer(key, path.stem, path, "questions", n_bytes) if _has_questions(path) else None
    try:
        if len(parts_of(path)) > 1:
            return None
        with closing(GgufFile(path)) as file:
            kind = get_value(file.metadata, "general.type", "model")
            architecture = get_value(file.metadata, "general.architecture")
            base = get_value(file.metadata, "general.base_model.0.name", "")
    except (EdgemergeError, OSError):
        return None
    if kind not in KINDS or not isinstance(architecture, str):
        return None
    told = str(base) if kind == "delta" else ""
    return Offer(key, path.stem, path, str(kind), n_bytes, architecture, told)


def _has_questions(path: Path) -> bool:
    """Whether the first line is a question of `edgemerge eval`."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline(_LINE_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and {"question", "options", "answer"} <= first.keys()
