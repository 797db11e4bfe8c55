"""Directories that were written: their tensors as they are stored, and what was made beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgemerge.formats.hub.safetensors import read_header

MADE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

Stored = dict[str, tuple[str, tuple[int, ...], bytes]]


def read_stored(folder: Path) -> Stored:
    """Type, shape and bytes of each tensor by its stored name."""
    found: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        for name, tensor in read_header(path).items():
            data = raw[tensor.offset : tensor.offset + tensor.nbytes]
            found[name] = tensor.dtype, tensor.shape, data
    return found


def made_digest(folder: Path) -> str:
    """Hash what is made of a GGUF's metadata."""
    digest = hashlib.sha256()
    for name in MADE:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
