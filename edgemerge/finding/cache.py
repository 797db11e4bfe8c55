"""The hub's cache on this machine: `models--ORG--NAME/snapshots/COMMIT/` with links into `blobs/`."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from edgemerge.errors import FormatError
from edgemerge.finding.files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONFIG,
    choose_files,
    is_weights,
    list_choices,
    list_names,
)
from edgemerge.finding.index import INDEX, MAX_INDEX_BYTES, parse_index
from edgemerge.finding.names import HubName

__all__ = [
    "Origin",
    "cache_folder",
    "find_cached",
    "find_doubt",
    "folder_name",
    "has_client",
    "hub_origin",
    "is_linked",
    "is_offline",
]

COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"}
FOLDER = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)", re.ASCII)


class Origin(NamedTuple):
    """Where a file or folder of the cache came from."""

    repo: str  # org/name
    commit: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"


def has_client() -> bool:
    """Tell whether huggingface_hub is installed."""
    return find_spec("huggingface_hub") is not None


def is_offline() -> bool:
    """Tell whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbid to fetch anything."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cache_folder() -> Path:
    """Return the folder of the cache, which HF_HOME and HF_HUB_CACHE name."""
    from huggingface_hub import constants  # the client itself would take 25 MiB of a merge's memory

    return Path(constants.HF_HUB_CACHE).absolute()


def hub_origin(path: Path) -> Origin | None:
    """Tell from its path which repository and commit a model of a cache is; None for any other."""
    for folder in (path, *path.parents):
        found = FOLDER.fullmatch(folder.parent.parent.name)
        if found and folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
            return Origin(f"{found['org']}/{found['name']}", folder.name)
    return None


def folder_name(path: Path) -> str:
    """Return what a file or folder is called; a snapshot has the name of its repository, not the commit's."""
    origin = hub_origin(path)
    return origin.repo.partition("/")[2] if origin and origin.commit == path.name else path.name


def find_cached(name: HubName) -> Path | None:
    """Find a model in the cache; None where it is not there, or not all of it.

    Returns
    -------
    Path or None
        The snapshot's folder, or in it the GGUF, the first part of a split one.

    Raises
    ------
    RecipeError
        As of `choose_files`.
    """
    folder = _snapshot(name)
    if folder is None:
        return None
    there = list_names(folder)
    if not list_choices(name, there):
        return None
    files = choose_files(name, there)
    if not _is_whole_split(files[-1], len(files)):
        return None
    if files[-1].endswith(".gguf"):
        return folder / files[0]
    return folder if _is_whole_folder(folder, there) else None


def find_doubt(name: HubName, found: Path) -> str | None:
    """Say why a model of the cache may not be what its name means on the hub; None where it is that.

    Parameters
    ----------
    name : HubName
        Of the model.
    found : Path
        Of `find_cached`.
    """
    if found.is_file():  # the repository may have more of them, or a directory that comes first
        only = f"{name} is taken to be {found.name}, the only GGUF of it in the hub's cache"
        return None if name.file_type else only
    there = list_names(found)
    if choose_files(name, there)[-1] == ADAPTER_WEIGHTS or not TOKENIZERS.isdisjoint(there):
        return None
    return f"the hub's cache has no tokenizer of {name}"  # which other programs do not always fetch


def is_linked(found: Path) -> bool:
    """Tell whether a model's weights are links into `blobs/`; else all of it would be fetched once more."""
    paths = [found] if found.is_file() else [one for one in found.iterdir() if is_weights(one.name)]
    return all(path.is_symlink() for path in paths)


def _snapshot(name: HubName) -> Path | None:
    folder = cache_folder() / f"models--{name.repo.replace('/', '--')}"
    commit = name.revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    found = folder / "snapshots" / commit
    return found if COMMIT.fullmatch(commit) and found.is_dir() else None


def _is_whole_split(last: str, count: int) -> bool:
    """Tell whether the last file of a model is no part, or the last part, with all others there."""
    part = re.search(r"-(\d{5})-of-(\d{5})\.\w+$", last, re.ASCII)
    return part is None or (part[1] == part[2] and count >= int(part[2]))


def _is_whole_folder(folder: Path, there: list[str]) -> bool:
    """Tell whether no shard is missing; weights are fetched last, so all else is there then."""
    if CONFIG not in there:
        return ADAPTER in there
    index = folder / INDEX
    if "model.safetensors" in there or not index.is_file():
        return True
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            return True  # its reader refuses it
        wanted = set(parse_index(index.read_bytes(), index).values())
    except (OSError, FormatError):
        return True
    return all(os.path.exists(folder / name) for name in wanted)
