"""Models on other machines: an address becomes a path that stands for the model, and nothing is stored.

`https://HOST/model.gguf` is a file, `https://HOST/folder` a Hugging Face directory, and
`hf://ORG/NAME[@REVISION][:TYPE][/FILE.gguf]` a model of the hub at the commit that it has now. Files without
tensors are fetched into a temporary folder; those with tensors are read as they are wanted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

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
from edgemerge.finding.names import HubName, read_hub_name
from edgemerge.remote.address import Address, read_address
from edgemerge.remote.file import Identity, RemoteFile, fetch_small, probe
from edgemerge.remote.stand_ins import add_file, new_folder
from edgemerge.shown_paths import call_path

__all__ = ["stream_model"]

HUB = "hf://"
EXTRA = "pip install 'edgemerge[hub]'"
MAX_SMALL = 64_000_000  # bytes of a file without tensors
_ON_HUB = re.compile(
    r"hf://(?P<repo>[^/@:]+/[^/@:]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/:]+|[^/:]+))?"
    r"(?::(?P<type>[^/]+))?(?:/(?P<file>.+))?",
    re.ASCII,
)
# A plus ends an address where another one follows, which may have a weight.
_NEXT = re.compile(r"\+(?=(?:[-+0-9.e]+\*)?[a-z][a-z0-9+.-]*://)", re.ASCII | re.IGNORECASE)
_WEIGHT = re.compile(r"(?P<weight>[-+0-9.e]+\*)?(?P<address>.+)", re.ASCII | re.IGNORECASE)


def stream_model(text: str, revision: str | None = None) -> Path:
    """Make a path that stands for a model at an address, or for one with adapters: ADDRESS+ADDRESS.

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
    """
    base, *adapters = _NEXT.split(text)
    paths = [str(_stream(base, revision))]
    for adapter in adapters:
        match = _WEIGHT.fullmatch(adapter)
        assert match is not None
        paths.append((match["weight"] or "") + str(_stream(match["address"], None)))
    return Path("+".join(paths))


def _stream(text: str, revision: str | None) -> Path:
    if text.startswith(HUB):
        return _stream_from_hub(text, revision)
    address = read_address(text)
    if address.path.endswith(".gguf"):
        return _stream_gguf(address)
    if is_weights(address.path):
        raise RecipeError(
            f"{address} is only the weights of a model; give the address of its folder, which has "
            f"{CONFIG} too"
        )
    return _stream_folder(address)


# -- https -------------------------------------------------------------------------------------------


def _stream_gguf(address: Address) -> Path:
    """Let a file stand for a GGUF, and others for all parts of a split one."""
    folder = new_folder("files")
    name = _file_name(address)
    part = PART.fullmatch(name)
    names = [name]
    if part is not None:
        count = int(name[-len("00001.gguf") : -len(".gguf")])
        stem = part["stem"]
        names = [f"{stem}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for one in names:
        there = address if one == name else address.beside(one)
        add_file(folder / one, RemoteFile(there, probe(there)))
    return folder / name


def _stream_folder(address: Address) -> Path:
    folder = new_folder(_file_name(address))
    call_path(folder, str(address))
    for name in SMALL:
        fetch_small(address.inside(name), folder / name, MAX_SMALL)
    there = {path.name for path in folder.iterdir()}
    if not there & {CONFIG, ADAPTER}:
        raise FormatError(
            f"is no model folder: it has no {CONFIG}; give the address of a GGUF file or of a Hugging "
            "Face directory",
            path=folder,
        )
    for name in _weights(folder, there):
        file = address.inside(name)
        add_file(folder / name, RemoteFile(file, probe(file)))
    return folder


def _weights(folder: Path, there: Collection[str]) -> list[str]:
    """Name a folder's files of tensors; their reader checks them one by one."""
    if CONFIG not in there:
        return [ADAPTER_WEIGHTS]
    if cache.INDEX not in there:
        return [SINGLE]
    try:
        shards = set(json.loads((folder / cache.INDEX).read_bytes())["weight_map"].values())
        return sorted(name for name in shards if Path(name).name == name and is_weights(name))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return []


def _file_name(address: Address) -> str:
    """Return what a file or folder is called here."""
    name = address.name.replace("/", "_").replace("\0", "_").encode()[:200].decode(errors="ignore")
    return address.host if name in ("", ".", "..") else name


# -- the hub -----------------------------------------------------------------------------------------


def _stream_from_hub(text: str, revision: str | None) -> Path:
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
    return _stream_repository(name, match["file"])


def _stream_repository(name: HubName, file: str | None) -> Path:
    from edgemerge.finding.fetch import find_repository

    found = find_repository(name)
    by_path = {one.path: one for one in found.files}
    files = choose_files(name, by_path) if file is None else _parts_of(name, file, by_path)
    folder = new_folder(f"models--{name.repo.replace('/', '--')}/snapshots/{found.commit}")
    call_path(folder, f"{HUB}{name.repo}@{found.commit}")
    root = read_address(found.endpoint).inside(name.repo).inside(f"resolve/{found.commit}")
    if found.token is not None:
        root = replace(root, authorization=f"Bearer {found.token}")
    for path in files:
        address = root.inside(path)
        if is_weights(path):  # a commit does not change; its mirrors may have ETags of their own
            add_file(folder / path, RemoteFile(address, Identity(by_path[path].n_bytes)))
        else:
            fetch_small(address, folder / path, MAX_SMALL)
    return folder / files[0] if files[-1].endswith(".gguf") else folder


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
