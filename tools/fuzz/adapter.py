"""A LoRA adapter: adapter_config.json or the tensors of PEFT, or a GGUF adapter or delta.

The input's first line says which: config, weights or gguf. The rest is what the file holds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edgemerge.formats.adapters.model import AdaptedModel, open_adapter
from edgemerge.types import UInt8
from tests.support.fake_source import FakeSource

__all__ = ["read_adapter"]


class ZeroSource(FakeSource):
    """A Llama of zeros, of which a delta has the checksum."""

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill with zeros."""
        out_u8[:] = 0


BASE = ZeroSource("base", n_layers=1)
SEED = Path(__file__).resolve().parents[2] / "tests" / "data" / "fuzz" / "adapter" / "weights"
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "trainable_token_indices": [0, 63]}
ROWS = 4  # of each update that are read


def read_adapter(data: bytes, folder: Path) -> None:
    """Open an adapter of which one file is the input, and read the first rows of its matrices."""
    kind, _, content = data.partition(b"\n")
    path = folder / "adapter"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if kind == b"gguf":
        path = path / "adapter.gguf"
        path.write_bytes(content)
    elif kind in (b"config", b"weights"):
        is_config = kind == b"config"
        config = content if is_config else json.dumps(CONFIG).encode()
        weights = SEED.read_bytes().partition(b"\n")[2] if is_config else content
        (path / "adapter_config.json").write_bytes(config)
        (path / "adapter_model.safetensors").write_bytes(weights)
    else:
        return
    adapter = open_adapter(path, BASE)
    try:
        model = AdaptedModel(path, BASE, [(adapter, 0.5)], closes_base=False)
        assert model.work_bytes() >= 0
        for updates in adapter.updates().values():
            for update in updates[:ROWS]:
                stop = min(ROWS, update.n_rows)
                for factor in (update.replacement, update.magnitude):
                    if factor is not None:
                        factor.read(0, stop)
                if update.added is not None:
                    update.added[0].read(0, stop)
                if update.change is not None:
                    update.change.left.read(0, stop)
                    update.change.right.read(0, min(ROWS, update.change.right.shape[0]))
    finally:
        adapter.close()
