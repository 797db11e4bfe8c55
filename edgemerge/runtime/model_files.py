"""The files that a model is in."""

from __future__ import annotations

from pathlib import Path

from edgemerge.errors import RuntimeFailure
from edgemerge.formats.gguf.model import GgufFile, GgufModel
from edgemerge.formats.gguf.split import sibling_parts
from edgemerge.suggestions import suggest_path

__all__ = ["check_adapter", "model_files", "open_gguf"]


def model_files(path: Path) -> list[Path]:
    """Files of a model: one, or all of those that it is split into.

    Parameters
    ----------
    path : Path
        A GGUF file; of a split model, any part.

    Raises
    ------
    RuntimeFailure
        One of them is missing, or it is a folder.
    """
    _check_file(path)
    files = sibling_parts(path)
    for file in files:
        if not file.is_file():
            raise RuntimeFailure(
                f"{file}: there is no such file, and {path.name} is a part of a model in "
                f"{len(files)}: get all of them, under these names"
            )
    return files


def open_gguf(path: Path) -> GgufModel:
    """Open a model's file by its header alone, before llama.cpp has to: bad files are named better here.

    Parameters
    ----------
    path : Path
        A GGUF file; of a split model, any part.

    Raises
    ------
    RuntimeFailure
        There is no such file, or it is a folder.
    FormatError
        It is no GGUF, is cut off or damaged, or a part of it is missing.
    """
    _check_file(path)
    return GgufModel(path)


def check_adapter(path: Path) -> None:
    """See that a LoRA adapter is a sound GGUF by its header, before llama.cpp has to read it.

    Raises
    ------
    RuntimeFailure
        There is no such file, or it is a folder.
    FormatError
        It is no GGUF, is cut off or damaged.
    """
    if path.is_dir():
        raise RuntimeFailure(
            f"{path}: is a folder; make a GGUF of it with llama.cpp's convert_lora_to_gguf.py first"
        )
    if not path.is_file():
        raise RuntimeFailure(f"{path}: there is no such file{suggest_path(path)}")
    GgufFile(path).close()


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise RuntimeFailure(f"{path}: is a folder; make a GGUF of it with edgemerge convert first")
    if not path.is_file():
        raise RuntimeFailure(f"{path}: there is no such file{suggest_path(path)}")
