"""Models on other machines: an address becomes a path that stands for the model, and nothing is stored.

`https://HOST/model.gguf` is a file, `https://HOST/folder` a Hugging Face directory, and
`hf://ORG/NAME[@REVISION][:TYPE][/FILE.gguf]` a model of the hub at the commit that it has now. `s3://BUCKET/KEY`,
`sftp://HOST/PATH` and what else fsspec knows are files and directories too. Files without tensors are fetched
into a temporary folder; those with tensors are read as they are wanted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from edgemerge.errors import FormatError, RecipeError
from edgemerge.finding import cache
from edgemerge.finding.files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONFIG,
    PART,
    SINGLE,
    SMALL,
    choose_files,
    is_weights,
)
from edgemerge.finding.index import INDEX, MAX_INDEX_BYTES, MAX_NAME, parse_index
from edgemerge.finding.keeping import keep_file
from edgemerge.finding.names import HubName, read_hub_name
from edgemerge.remote.address import read_address
from edgemerge.remote.any_address import AnyAddress, read_any_address
from edgemerge.remote.file import RemoteFile, fetch_small
from edgemerge.remote.ranged import Identity, RangedFile
from edgemerge.remote.spill import Spill
from edgemerge.remote.stand_ins import add_file, new_folder
from edgemerge.remote.visits import Visit, visit
from edgemerge.shown_paths import call_path
from edgemerge.types import Progress

__all__ = ["Streamer"]

HUB = "hf://"
EXTRA = "pip install 'edgemerge[hub]'"
MAX_SMALL = 64_000_000  # bytes of a file without tensors
_ON_HUB = re.compile(
    r"hf://(?P<repo>[^/@:]+/[^/@:]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/:]+|[^/:]+))?"
    r"(?::(?P<type>[^/]+))?(?:/(?P<file>.+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
# A plus ends an address where another one follows, which may have a weight.
_NEXT = re.compile(r"\+(?=(?:[-+0-9.e]+\*)?[a-z][a-z0-9+.-]*://)", re.ASCII | re.IGNORECASE)
_WEIGHT = re.compile(r"(?P<weight>[-+0-9.e]+\*)?(?P<address>.+)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Streamer:
    """Makes paths that stand for models at addresses, or for one with adapters: ADDRESS+ADDRESS.

    Attributes
    ----------
    spill : Path, optional
        Folder in which what was read is kept, to be read again.
    keep : Path, optional
        Folder in which files with tensors are kept whole, as of `edgemerge.finding.keeping`.
    show_progress : callable
        Called with what is fetched to be kept; gives a context whose value is told bytes done and in all.
    """

    spill: Path | None
    keep: Path | None
    show_progress: Callable[[str], AbstractContextManager[Progress]]

    def find_model(self, text: str, revision: str | None = None) -> Path:
        """Make the path of a model.

        Parameters
        ----------
        text : str
            The address; for which `is_address` is true.
        revision : str, optional
            A branch, tag or commit of a model on the hub, where the text has none.

        Raises
        ------
        RecipeError
            The address cannot be read, or the hub has no such model.
        FormatError
            The server does not give the files.
        OutputError
            There is no room to keep them.
        """
        base, *adapters = _NEXT.split(text)
        paths = [str(self._find(base, revision))]
        for adapter in adapters:
            match = _WEIGHT.fullmatch(adapter)
            assert match is not None
            paths.append((match["weight"] or "") + str(self._find(match["address"], None)))
        return Path("+".join(paths))

    def _find(self, text: str, revision: str | None) -> Path:
        if text.startswith(HUB):
            name, file = _read_hub(text, revision)
            return self._find_repository(name, file)
        address = read_any_address(text)
        is_gguf = address.path.endswith(".gguf")
        if not is_gguf and is_weights(address.path):
            raise RecipeError(
                f"{address} is only the weights of a model; give the address of its folder, which has "
                f"{CONFIG} too"
            )
        with closing(visit(address)) as there:
            return (self._find_gguf if is_gguf else self._find_folder)(there, address)

    def _find_gguf(self, there: Visit, address: AnyAddress) -> Path:
        """Let a file stand for a GGUF, and others for all parts of a split one."""
        folder, name = new_folder("files"), _file_name(address)
        for one in _split_names(name):
            part = address if one == name else address.beside(one)
            self._place(folder / one, partial(there.open_file, part))
        return folder / name

    def _find_folder(self, there: Visit, address: AnyAddress) -> Path:
        folder = new_folder(_file_name(address))
        call_path(folder, str(address))
        for name in SMALL:
            max_bytes = MAX_INDEX_BYTES if name == INDEX else MAX_SMALL
            there.fetch_small(address.inside(name), folder / name, max_bytes)
        found = {path.name for path in folder.iterdir()}
        if not found & {CONFIG, ADAPTER}:
            raise FormatError(
                f"is no model folder: it has no {CONFIG}; give the address of a GGUF file or of a "
                "Hugging Face directory",
                path=folder,
            )
        for name in _weights(folder, found):
            self._place(folder / name, partial(there.open_file, address.inside(name)))
        return folder

    def _find_repository(self, name: HubName, file: str | None) -> Path:
        from edgemerge.finding.fetch import find_repository

        found = find_repository(name)
        if not _COMMIT.fullmatch(found.commit):  # it becomes the name of a folder
            raise RecipeError(f"{name.repo} has no commit on {found.endpoint}; check HF_ENDPOINT")
        by_path = {one.path: one for one in found.files}
        files = choose_files(name, by_path) if file is None else _parts_of(name, file, by_path)
        folder = new_folder(f"models--{name.repo.replace('/', '--')}/snapshots/{found.commit}")
        call_path(folder, f"{HUB}{name.repo}@{found.commit}")
        root = read_address(found.endpoint).inside(name.repo).inside(f"resolve/{found.commit}")
        if found.token is not None:
            root = replace(root, authorization=f"Bearer {found.token}")
        for path in files:
            if not _is_inside(path):
                raise RecipeError(f"{name.repo} has a file {path[:80]!r}, which no folder can have")
            address = root.inside(path)
            if is_weights(
                path
            ):  # a commit does not change; its mirrors may have ETags of their own
                identity, blob = Identity(by_path[path].n_bytes), by_path[path].blob
                opened = partial(RemoteFile, address, identity)
                self._place(folder / path, opened, blob if len(blob) == 64 else None)
            else:
                fetch_small(address, folder / path, MAX_SMALL, is_listed=True)
        return folder / files[0] if files[-1].endswith(".gguf") else folder

    def _place(
        self, path: Path, open_file: Callable[[Spill | None], RangedFile], sha256: str | None = None
    ) -> None:
        """Let a path stand for a file of tensors, or lead to where it is kept."""
        if self.keep is None:
            add_file(path, open_file(None if self.spill is None else Spill(self.spill)))
            return
        with closing(open_file(None)) as remote:
            kept = keep_file(remote, self.keep, sha256, self.show_progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(kept.absolute())


def _split_names(name: str) -> list[str]:
    """List the names of all parts of the GGUF that a file's name makes it a part of."""
    part = PART.fullmatch(name)
    if part is None:
        return [name]
    count = int(name[-len("00001.gguf") : -len(".gguf")])
    return [f"{part['stem']}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]


def _weights(folder: Path, there: Collection[str]) -> list[str]:
    """Name a folder's files of tensors.

    Raises
    ------
    FormatError
        The index is none.
    """
    if CONFIG not in there:
        return [ADAPTER_WEIGHTS]
    if INDEX not in there:
        return [SINGLE]
    return sorted(set(parse_index((folder / INDEX).read_bytes(), folder / INDEX).values()))


def _is_inside(path: str) -> bool:
    """Tell whether a path of the hub can be one of a file in a folder here."""
    parts = PurePosixPath(path).parts
    is_short = path.isprintable() and all(len(part.encode()) <= MAX_NAME for part in parts)
    return is_short and not path.startswith("/") and ".." not in parts


def _file_name(address: AnyAddress) -> str:
    """Return what a file or folder is called here."""
    name = address.name.replace("/", "_").replace("\0", "_").encode()[:200].decode(errors="ignore")
    return address.host if name in ("", ".", "..") else name


def _read_hub(text: str, revision: str | None) -> tuple[HubName, str | None]:
    """Read an address of the hub: the model, and the file of it that is named."""
    match = _ON_HUB.fullmatch(text)
    name = match and read_hub_name(match["repo"], match["revision"] or revision)
    if match is None or name is None or (match["type"] and match["file"]):
        raise RecipeError(
            "an address of the hub is hf://ORG/NAME, hf://ORG/NAME@REVISION, hf://ORG/NAME:TYPE or "
            "hf://ORG/NAME/FILE.gguf; write it so"
        )
    name = name._replace(file_type=match["type"])
    if not cache.has_client():
        raise RecipeError(f"{HUB}{name} needs huggingface_hub: {EXTRA}")
    if cache.is_offline():
        raise RecipeError(
            f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to read {HUB}{name}; unset it, or give "
            f"{name}, if the hub's cache has the model"
        )
    return name, match["file"]


def _parts_of(name: HubName, file: str, there: Collection[str]) -> list[str]:
    """List the files of the GGUF that an address names, the named one first."""
    if file not in there or not file.endswith(".gguf"):
        ggufs = sorted(one for one in there if one.endswith(".gguf"))
        known = f"; it has {', '.join(ggufs)[:200]}" if ggufs else ""
        raise RecipeError(f"{name.repo} has no GGUF file {file}{known}; check the name")
    part = PART.fullmatch(file)
    if part is None:
        return [file]
    parts = (one for one in there if (m := PART.fullmatch(one)) and m["stem"] == part["stem"])
    return [file, *sorted(one for one in parts if one != file)]
