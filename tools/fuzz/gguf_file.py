"""A GGUF file: its header, every value of its metadata, every row of its tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgemerge.formats import open_model
from edgemerge.formats.gguf.metadata import Array, decode_value

__all__ = ["read_gguf"]


def read_gguf(data: bytes, folder: Path) -> None:
    """Read an input as a model, whole."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    model = open_model(path)
    try:
        for raw in model.metadata().values():
            if isinstance(value := decode_value(raw), Array):
                list(value)
        for name, spec in model.specs().items():
            if spec.nbytes:
                model.read_rows(name, 0, spec.n_rows, np.empty(spec.nbytes, np.uint8))
    finally:
        model.close()
