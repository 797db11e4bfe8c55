"""A small GGUF in memory that a test can change and write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgemerge.formats.gguf.metadata import Array, Value, decode_value, encode_value
from edgemerge.formats.gguf.model import GgufFile
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.types import TensorSpec

TOKENS, TYPES, SCORES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "scores"))


@dataclass
class OddModel:
    """A GGUF in memory that can be changed and written."""

    metadata: dict[str, bytes]
    tensors: dict[str, tuple[tuple[int, ...], str, bytes]]  # shape, type, data
    changes: list[str] = field(default_factory=list)

    @property
    def architecture(self) -> str:
        return str(decode_value(self.metadata["general.architecture"]))

    def write(self, path: Path) -> Path:
        specs = [TensorSpec(n, s, t, len(data)) for n, (s, t, data) in self.tensors.items()]
        layout = make_layout(self.metadata, specs)
        with path.open("wb") as file:
            file.write(layout.header)
            for name, (_, _, data) in self.tensors.items():
                file.seek(layout.offsets[name])
                file.write(data)
            file.truncate(layout.n_bytes)
        return path

    def texts(self) -> list[bytes]:
        return [str(text).encode() for text in self.listed(TOKENS)]

    def listed(self, key: str) -> list[Value]:
        value = decode_value(self.metadata[key]) if key in self.metadata else None
        return list(value) if isinstance(value, Array) else []

    def set(self, key: str, value: object, kind: str) -> str:
        self.metadata[key] = encode_value(value, kind)  # type: ignore[arg-type]
        shown = f"{value!r}"
        return f"{key} = {shown if len(shown) < 40 else shown[:40] + '…'} as {kind}"


def load_base(path: Path) -> OddModel:
    """Read a small GGUF whole."""
    file = GgufFile(path)
    tensors = {}
    for name, spec in file.specs.items():
        raw = np.empty(spec.nbytes, np.uint8)
        file.read_bytes(name, 0, raw)
        tensors[name] = (spec.shape, spec.dtype, raw.tobytes())
    file.close()
    return OddModel(dict(file.metadata), tensors)
