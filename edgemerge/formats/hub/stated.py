"""What a GGUF states of its architecture, for the configuration that is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.hub.config import MAX_LAYERS
from edgemerge.types import Float32, TensorSpec

__all__ = ["REMEDY", "Json", "ReadF32", "Stated"]

REMEDY = "give the directory that it was made from, or write a GGUF"

Json = dict[str, Any]


class ReadF32(Protocol):
    """Reads tensors of a model."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Return rows [start, stop) of a tensor in float32, flat; by default all."""
        ...


class Stated:
    """Metadata and tensors of one model.

    Parameters
    ----------
    path : Path
        The model, named in errors.
    metadata : mapping of GGUF key to typed value
        Its own.
    specs : mapping of str to TensorSpec
        Its tensors by GGUF name.
    read_f32 : ReadF32
        Reads small tensors, or some rows of large ones.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, bytes],
        specs: Mapping[str, TensorSpec],
        read_f32: ReadF32,
    ) -> None:
        self.path, self.specs, self.read_f32 = path, specs, read_f32
        self.name = str(get_value(metadata, "general.architecture"))
        prefix = f"{self.name}."
        self.keys = [key.removeprefix(prefix) for key in metadata if key.startswith(prefix)]
        self._metadata = metadata

    def get(self, key: str) -> Any:
        """Return a value of the architecture; a list of an array, and a float32 as one writes it.

        Raises
        ------
        FormatError
            It is an array of more items than any model has layers.
        """
        return self.get_whole(f"{self.name}.{key}")

    def get_whole(self, key: str) -> Any:
        """Return a value by its whole key."""
        value = get_value(self._metadata, key)
        if isinstance(value, Array):
            if len(value) > MAX_LAYERS:
                raise self.refuse(f"its {key} is a list of {len(value)}")
            return list(value)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def get_list(self, key: str, n_layers: int) -> list[Any]:
        """Return a value for each layer, be it stated for each or once for all."""
        value = self.get(key)
        return value if isinstance(value, list) else [value] * n_layers

    def refuse(self, what: str) -> FormatError:
        """Make the error for a model that no directory holds."""
        return FormatError(f"{what}, so no directory can be made of it; {REMEDY}", path=self.path)
