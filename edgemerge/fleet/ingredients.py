"""What a model of a site is made of: found in the registry or on this machine, and known by its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edgemerge.errors import FormatError, OutputError
from edgemerge.fleet.site_file import Site, Wanted
from edgemerge.formats.adapters.reference import is_adapter
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.model import GgufFile
from edgemerge.formats.json_file import read_object
from edgemerge.output.file import write_file
from edgemerge.site.folder import SiteFolder
from edgemerge.site.record import Part

__all__ = ["Entry", "FileHashes", "Ingredient", "Registry", "fetch_all", "find_all", "role_of"]

PIECE = 1 << 20


class Entry(Protocol):
    """What a registry says of one file."""

    @property
    def name(self) -> str:
        """Of the file, without its version."""

    @property
    def version(self) -> str:
        """As `1.2`."""

    @property
    def file_name(self) -> str:
        """What the fetched file is called."""

    @property
    def n_bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> str:
        """Its hash."""

    @property
    def kind(self) -> str:
        """delta, adapter or model."""

    @property
    def base(self) -> str | None:
        """Checksum of a delta's base; of a model, its own where it is stated."""

    @property
    def publisher(self) -> str:
        """The key that signed it."""


E = TypeVar("E", bound=Entry)


class Registry(Protocol[E]):
    """Where entries come from; each method raises EdgemergeError where it cannot be done."""

    def refresh(self) -> None:
        """Read what the registry has now."""

    def find(self, name: str, version: str | None) -> E:
        """Find a file by its name and version, None for the newest."""

    def fetch(self, entry: E, folder: Path, progress: Callable[[int, int], None]) -> Path:
        """Bring a file into a folder, whole and with the right hash, or not at all."""


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One of the inputs.

    Attributes
    ----------
    name, version : str
        Of the registry's entry; of a path its name, and no version.
    path : Path or None
        Where it lies; None while it is not fetched.
    sha256 : str
        Of the file; of a folder, of the names and hashes of its files.
    n_bytes : int
        Its size.
    role : str
        base, expert, delta or adapter.
    weight : float or None
        Of an expert.
    publisher : str or None
        Key that published it.
    entry : Entry or None
        The registry's.
    """

    name: str
    version: str
    path: Path | None
    sha256: str
    n_bytes: int
    role: str
    weight: float | None = None
    publisher: str | None = None
    entry: Entry | None = None

    def as_part(self) -> Part:
        """Return what the record of a model says of it."""
        return Part(self.name, self.version, self.sha256, self.role)


class FileHashes:
    """SHA-256 of files, each of which is read once as long as it does not change.

    Parameters
    ----------
    path : Path or None
        Where hashes are kept between runs; None to keep none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        self._used: dict[str, Any] = {}
        if path is not None and path.exists():
            try:
                self._known = read_object(path)
            except FormatError:  # of a disk that failed: they are computed again
                self._known = {}

    def of(self, path: Path, progress: Callable[[int, int], None] | None = None) -> str:
        """Return the SHA-256 of a file; of a folder, of the names and hashes of the files in it.

        Raises
        ------
        FormatError
            It cannot be read.
        """
        if path.is_dir():
            names = sorted(one for one in path.rglob("*") if one.is_file())
            lines = [f"{self.of(one)}  {one.relative_to(path)}\n" for one in names]
            return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
        try:
            stat = path.stat()
            state = [stat.st_ino, stat.st_size, stat.st_mtime_ns]
            known = self._known.get(str(path))
            if isinstance(known, list) and known[:3] == state and isinstance(known[3], str):
                sha256 = known[3]
            else:
                sha256 = _hash(path, stat.st_size, progress)
        except OSError as error:
            raise FormatError(f"cannot be read ({error.strerror})", path=path) from error
        self._used[str(path)] = [*state, sha256]
        return sha256

    def keep(self) -> None:
        """Write the hashes that were asked for, for the next run."""
        if self._path is not None and self._used != self._known:
            write_file(self._path, json.dumps(self._used).encode())


def find_all(site: Site, hashes: FileHashes, registry: Registry[Any] | None) -> list[Ingredient]:
    """Find the base, first, and the experts of a site whose merge is no recipe of its own.

    Parameters
    ----------
    site : Site
        With a base.
    hashes : FileHashes
        Of files of this machine.
    registry : Registry or None
        Refreshed; None where the site names none.

    Raises
    ------
    EdgemergeError
        The registry has no such entry, or a file cannot be read.
    """
    assert site.base is not None
    found = [_find(site.base, hashes, registry, is_base=True)]
    return found + [_find(one, hashes, registry, is_base=False) for one in site.experts]


def fetch_all(
    found: Sequence[Ingredient],
    registry: Registry[Any] | None,
    folder: SiteFolder,
    progress: Callable[[int, int], None],
) -> tuple[list[Ingredient], int]:
    """Fetch what is not here yet; return the inputs with their paths, and the bytes that were fetched.

    Raises
    ------
    EdgemergeError
        As of the registry's client; what was fetched so far is kept, and the next call goes on.
    """
    here, n_bytes = [], 0
    for one in found:
        if one.entry is not None:
            assert registry is not None
            if not (folder.inputs / one.entry.file_name).exists():
                n_bytes += one.n_bytes
            one = replace(one, path=_fetch(one.entry, registry, folder.inputs, progress))
        here.append(one)
    return here, n_bytes


def _fetch(
    entry: Entry,
    registry: Registry[Any],
    folder: Path,
    progress: Callable[[int, int], None],
) -> Path:
    """Fetch a file; one of its name that is damaged is fetched again."""
    try:
        return registry.fetch(entry, folder, progress)
    except OutputError:
        if not (folder / entry.file_name).is_file():
            raise
        (folder / entry.file_name).unlink()
        return registry.fetch(entry, folder, progress)


def _find(
    wanted: Wanted, hashes: FileHashes, registry: Registry[Any] | None, *, is_base: bool
) -> Ingredient:
    if wanted.path is not None:
        path = wanted.path
        size = path.stat().st_size if path.is_file() else 0
        role = "base" if is_base else role_of(path)
        return Ingredient(path.name, "", path, hashes.of(path), size, role, wanted.weight)
    assert registry is not None
    entry = registry.find(wanted.name, wanted.version)
    role = "expert" if entry.kind == "model" else entry.kind
    return Ingredient(
        entry.name,
        entry.version,
        None,
        entry.sha256,
        entry.n_bytes,
        "base" if is_base else role,
        wanted.weight,
        entry.publisher,
        entry,
    )


def role_of(path: Path) -> str:
    """Tell what a path is beside a base: an expert, a delta or an adapter."""
    if not is_adapter(path):
        return "expert"
    if path.is_dir():
        return "adapter"
    with closing(GgufFile(path)) as file:
        return str(get_value(file.metadata, "general.type"))


def _hash(path: Path, n_bytes: int, progress: Callable[[int, int], None] | None) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            done += len(piece)
            if progress is not None:
                progress(done, n_bytes)
    return digest.hexdigest()
