"""The child of `edgemerge.warm`: compiles the kernels of one merge by doing it on zeros.

python -m edgemerge.warm_child METHOD ALIGN READ,TYPES WRITTEN,TYPES
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgemerge.formats.ggml_types import row_bytes
from edgemerge.formats.gguf_writer import make_layout
from edgemerge.formats.metadata import encode_value
from edgemerge.merge import merge
from edgemerge.methods import METHODS
from edgemerge.recipe import make_recipe
from edgemerge.types import TensorSpec

__all__ = ["merge_zeros"]

SHAPE = (256, 256)  # a multiple of every block, and of the heads
N_HEADS, N_KV_HEADS = 4, 2
PARAMETERS = {"density": 0.5, "epsilon": 0.1, "t": 0.5}


def merge_zeros(method: str, align: str, read: Sequence[str], written: Sequence[str]) -> None:
    """Merge tiny models of zeros: a tensor per type that is written, read in every type."""
    row = METHODS[method]
    names = {**row.model_parameters, **row.global_parameters}
    n_experts = 1 if row.n_models[1] == 1 else 2
    with tempfile.TemporaryDirectory(prefix="edgemerge-") as name:
        folder = Path(name)
        # The base has the types to write, so that `keep` writes them; the experts, in turns, the others.
        base = _write_zeros(folder / "base.gguf", written)
        for turn in range(0, len(read), n_experts):
            experts = [
                _write_zeros(folder / f"{i}.gguf", [read[(turn + i) % len(read)]] * len(written))
                for i in range(n_experts)
            ]
            models = experts if row.needs_base else [base, *experts][: row.n_models[1]]
            recipe = make_recipe(
                method,
                [(str(path), None) for path in models],
                base=str(base) if row.needs_base else None,
                parameters={key: value for key, value in PARAMETERS.items() if key in names},
                out_type="keep",
                align=align,
            )
            merge(recipe, folder / "out.gguf", force=True)


def _write_zeros(path: Path, dtypes: Sequence[str]) -> Path:
    """Write a GGUF of one layer: attention, and one more tensor per type."""
    width = SHAPE[1]
    rows = {"attn_q": width, "attn_k": width // 2, "attn_v": width // 2, "attn_output": width}
    rows |= {f"ffn_{i}": SHAPE[0] for i in range(len(dtypes))}
    specs = [
        TensorSpec(f"blk.0.{stem}.weight", (n, width), dtype, n * row_bytes(dtype, width))
        for (stem, n), dtype in zip(rows.items(), [dtypes[0]] * 4 + list(dtypes), strict=True)
    ]
    metadata = {
        "general.architecture": encode_value("llama", "str"),
        "llama.block_count": encode_value(1, "u32"),
        "llama.attention.head_count": encode_value(N_HEADS, "u32"),
        "llama.attention.head_count_kv": encode_value(N_KV_HEADS, "u32"),
    }
    layout = make_layout(metadata, specs)
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.n_bytes)
    return path


def _transport_heads() -> None:
    """Compile the transport itself, which heads of zeros do not need."""
    from edgemerge.transport import transport

    transport(np.random.default_rng(0).random((12, 12)))


if __name__ == "__main__":
    if sys.argv[2] != "off":
        _transport_heads()
    merge_zeros(sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4].split(","))
