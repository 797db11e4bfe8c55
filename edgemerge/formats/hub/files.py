"""The files of a Hugging Face directory: what makes it one, and where its shards hold which tensor."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.finding.cache import folder_name
from edgemerge.finding.index import INDEX, MAX_INDEX_BYTES, parse_index
from edgemerge.formats.files import read_bounded
from edgemerge.formats.hub.safetensors import StoredTensor, read_header

__all__ = ["ADAPTER", "CARD", "CONFIG", "FOLDER_FILES", "GENERATION", "INDEX", "SHARD", "SINGLE"]
__all__ += ["TOKENIZER_FILES", "is_adapter_dir", "is_hub_dir", "refuse_folder", "shard_name"]
__all__ += ["stored_tensors"]
__all__ += ["unread_files"]

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE = "model.safetensors"
GENERATION, CARD = "generation_config.json", "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
FOLDER_FILES = (CONFIG, GENERATION, CARD, SINGLE, INDEX, *TOKENIZER_FILES)  # beside shards
SHARD = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")


def shard_name(number: int, count: int) -> str:
    """Name one of several files of weights; the first has the number 1."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def is_hub_dir(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a directory that looks like a Hugging Face model or adapter."""
    return any((Path(path) / name).is_file() for name in (CONFIG, ADAPTER))


def is_adapter_dir(path: Path) -> bool:
    """Tell whether a directory is a LoRA adapter without its model; some tools save config.json with it."""
    return (path / ADAPTER).is_file() and not has_weights(path)


def has_weights(path: Path) -> bool:
    """Tell whether a directory has a model's own weights, in safetensors."""
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return True
    return any(SHARD.fullmatch(found.name) for found in path.glob("model-*.safetensors"))


def refuse_folder(path: Path) -> None:
    """Refuse a folder that is no model.

    Raises
    ------
    FormatError
        It has no config.json.
    """
    if not is_hub_dir(path):
        raise FormatError(
            f"is no model folder: it has no {CONFIG}; give a GGUF file or a Hugging Face directory",
            path=path,
        )
    if is_adapter_dir(path):
        raise FormatError(
            "is a LoRA adapter, not a model; give it with its base model, as in BASE+ADAPTER",
            path=path,
        )


def stored_tensors(path: Path) -> dict[Path, dict[str, StoredTensor]]:
    """Return the headers of all files of weights, in the order of their names.

    Which these are is decided as in transformers (`_get_resolved_checkpoint_files`): the whole file before
    the index. Shards without an index are read where none is missing.

    Raises
    ------
    FormatError
        A file is missing, or two of them contradict each other.
    """
    if (path / SINGLE).is_file():
        return {path / SINGLE: read_header(path / SINGLE)}
    if (path / INDEX).is_file():
        return _read_shards(path)
    if shards := sorted(p for p in path.glob("model-*.safetensors") if SHARD.fullmatch(p.name)):
        return _read_unlisted(path, shards)
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        what = f"rename {others[0]} to {SINGLE}" if len(others) == 1 else f"get {INDEX} too"
        raise FormatError(
            f"has neither {SINGLE} nor {INDEX}, only {', '.join(others)[:160]}; {what}, if these are "
            "the weights under their names in transformers",
            path=path,
        )
    pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in path.glob(s))
    if pickles:
        raise FormatError(
            f"holds its weights as pickle only ({pickles[0]}), which is never read because it can "
            "run code; save the model as safetensors, or give a GGUF",
            path=path,
        )
    raise FormatError(
        f"has neither {SINGLE} nor {INDEX}; get one of them, or give a GGUF", path=path
    )


def unread_files(path: Path) -> str | None:
    """Say that weights lie beside those that are read; None where there are no others."""
    if not (path / SINGLE).is_file():
        return None
    others = sorted(p.name for p in path.glob("model-*.safetensors") if SHARD.fullmatch(p.name))
    if (path / INDEX).is_file():
        others.append(INDEX)
    if not others:
        return None
    shown = others[0] if len(others) == 1 else f"{others[0]} and {len(others) - 1} more"
    return f"{folder_name(path)} is read from {SINGLE}, as transformers does, and not from {shown}"


def _read_unlisted(path: Path, found: list[Path]) -> dict[Path, dict[str, StoredTensor]]:
    """Read shards that no index lists, by the numbers in their names."""
    counts = {int(match[2]) for p in found if (match := SHARD.fullmatch(p.name))}
    if len(counts) > 1:
        raise FormatError(
            f"has shards of {len(counts)} different sets but no {INDEX}; remove those that do not "
            "belong to the model",
            path=path,
        )
    count = counts.pop()
    names = {p.name for p in found}
    for number in range(1, count + 1):
        name = shard_name(number, count)
        if name not in names:
            raise FormatError(f"shard {name!r} is missing; get it too", path=path)
    shards: dict[Path, dict[str, StoredTensor]] = {}
    homes: dict[str, Path] = {}
    for shard in found:
        shards[shard] = read_header(shard)
        for name in shards[shard]:
            if name in homes:
                raise FormatError(
                    f"is in {homes[name].name} too; get {INDEX}, which says where it belongs",
                    path=shard,
                    tensor=name,
                )
            homes[name] = shard
    return shards


def _read_shards(path: Path) -> dict[Path, dict[str, StoredTensor]]:
    index = path / INDEX
    weight_map = parse_index(read_bounded(index, MAX_INDEX_BYTES), index)
    shards: dict[Path, dict[str, StoredTensor]] = {}
    for shard_name in sorted(set(weight_map.values())):
        shard = path / shard_name
        if not shard.is_file():
            raise FormatError(f"shard {shard_name!r} is missing; get it too", path=path)
        shards[shard] = read_header(shard)
        for name in shards[shard]:
            if weight_map.get(name) != shard_name:
                raise FormatError(
                    f"is in this shard, but {INDEX} does not list it there; get both files again",
                    path=shard,
                    tensor=name,
                )
    for name, shard_name in weight_map.items():
        if name not in shards[path / shard_name]:
            raise FormatError(
                f"{INDEX} lists it in this shard, which does not hold it; get both files again",
                path=path / shard_name,
                tensor=name,
            )
    return shards
