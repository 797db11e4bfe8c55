"""One file of a Hugging Face directory: its config, index, tokenizer or model card.

The input's first line says which: the small model of tests/data/architectures, and the file's name
in it. The rest is what the file holds.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgemerge.formats.hub.model import HubModel
from tests.support.fixtures import unpacked

__all__ = ["read_directory"]

MODELS = unpacked("architectures")
FAMILIES = frozenset(path.name for path in MODELS.iterdir() if path.is_dir())
FILES = (
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "README.md",
)


def read_directory(data: bytes, folder: Path) -> None:
    """Read a model in which one file is the input."""
    line, _, content = data.partition(b"\n")
    family, _, name = line.decode("latin-1").partition(" ")
    if name not in FILES or family not in FAMILIES:
        return
    model = folder / family
    if not model.is_dir():
        model.mkdir()
        for file in (MODELS / family).iterdir():
            os.symlink(file, model / file.name)
    changed = model / name
    changed.unlink(missing_ok=True)
    try:
        changed.write_bytes(content)
        source = HubModel(model)
        try:
            source.metadata()
        finally:
            source.close()
    finally:
        changed.unlink()
        if (MODELS / family / name).exists():
            os.symlink(MODELS / family / name, changed)
