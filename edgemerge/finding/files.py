"""Which files of a repository a merge reads: never pickles, never other programs' formats."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from edgemerge.errors import RecipeError
from edgemerge.finding.names import HubName

__all__ = ["choose_files", "is_weights", "list_choices", "list_names"]

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
SMALL: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "README.md",
)
SMALL += ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model")
SMALL += ("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json")
SMALL += ("chat_template.jinja", "chat_template.json", ADAPTER)
TEMPLATES = "additional_chat_templates/"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.gguf", re.ASCII)
TYPE = re.compile(r"(?:I?Q\d\w*|BF16|F16|F32|TQ\d_0|MXFP4\w*)", re.ASCII | re.IGNORECASE)
NO_MODEL = ("mmproj", "imatrix")  # what lies beside the models of a repository
MAX_SHOWN = 12


def is_weights(name: str) -> bool:
    """Tell whether a file has tensors; all others are small."""
    return name.endswith((".safetensors", ".gguf"))


def list_names(folder: Path) -> list[str]:
    """List the files below a folder by their paths in it."""
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def choose_files(name: HubName, there: Collection[str]) -> list[str]:
    """Choose from the files of a repository, small ones first, weights last.

    Parameters
    ----------
    name : HubName
        With a file type, its GGUF is chosen. Without one, a Hugging Face directory, else the only GGUF.
    there : collection of str
        Paths in the repository.

    Raises
    ------
    RecipeError
        Nothing of it can be read, or there are several models to choose from.
    """
    found = list_choices(name, there)
    if len(found) == 1:
        return found[0]
    models = _ggufs(there)
    if not models:
        raise _nothing_to_read(name, there)
    types = sorted({t for stem in models if (t := _type_of(stem))})
    known = _shown(types or [PurePosixPath(stem).name for stem in models])
    if found:
        what = f"has {len(found)} GGUF models" + (f" of {name.file_type}" if name.file_type else "")
        raise RecipeError(f"{name.repo} {what}; choose one, as in {name.repo}:TYPE, of {known}")
    raise RecipeError(f"{name.repo} has no GGUF of the type {name.file_type}; it has {known}")


def list_choices(name: HubName, there: Collection[str]) -> list[list[str]]:
    """List the files of each model that a name may mean; see `choose_files`."""
    if name.file_type is None:
        for config in (CONFIG, ADAPTER):
            weights = _weights(there, is_adapter=config == ADAPTER)
            if config in there and weights:
                small = [f for f in sorted(there) if f in SMALL or f.startswith(TEMPLATES)]
                return [[*small, *weights]]
        return list(_ggufs(there).values())
    # A type ends a word: Q4_0 is neither in IQ4_0 nor in Q4_0_4_4.
    wanted = re.escape(name.file_type)
    fits = re.compile(rf"(?<![A-Za-z0-9]){wanted}(?![A-Za-z0-9_])", re.IGNORECASE)
    return [files for stem, files in _ggufs(there).items() if fits.search(stem)]


def _weights(there: Collection[str], *, is_adapter: bool) -> list[str]:
    """List the safetensors that `edgemerge.formats.hub` would read."""
    if is_adapter:
        return [f for f in (ADAPTER_WEIGHTS,) if f in there]
    if SINGLE in there:
        return [SINGLE]
    if shards := sorted(f for f in there if SHARD.fullmatch(f)):
        return shards
    others = (f for f in there if f.endswith(".safetensors") and "/" not in f)
    return sorted(f for f in others if not f.startswith(("consolidated", "adapter_model")))


def _ggufs(there: Collection[str]) -> dict[str, list[str]]:
    """Group GGUF files by model: all parts of a split one are one."""
    models: dict[str, list[str]] = {}
    for file in sorted(there):
        if file.endswith(".gguf") and not any(word in file.lower() for word in NO_MODEL):
            part = PART.fullmatch(file)
            models.setdefault(part["stem"] if part else file.removesuffix(".gguf"), []).append(file)
    return models


def _type_of(stem: str) -> str:
    """Return the type that a file's name ends with, as in `model-Q4_K_M` and `model.Q4_K_M`."""
    last = re.split("[.-]", PurePosixPath(stem).name)[-1]
    return last if TYPE.fullmatch(last) else ""


def _nothing_to_read(name: HubName, there: Collection[str]) -> RecipeError:
    pickles = sorted(f for f in there if f.endswith((".bin", ".pt", ".pth")))
    if pickles:
        return RecipeError(
            f"{name.repo} has its weights as pickle only ({pickles[0]}), which is never read because "
            "it can run code; look for a repository with safetensors or GGUF"
        )
    return RecipeError(
        f"{name.repo} has neither safetensors with a {CONFIG} nor GGUF; check the name"
    )


def _shown(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + rest
