"""The child of `edgemerge.warm`: compiles the kernels of a merge by using them, on a tiny model.

python -m edgemerge.warm_child METHOD ALIGN NEURONS READ,TYPES WRITTEN,TYPES WEIGHED,TYPES
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgemerge.formats.codec import CODECS, row_bytes
from edgemerge.formats.gguf_writer import make_layout
from edgemerge.formats.metadata import encode_value
from edgemerge.formats.weighted import WEIGHTED_SCRATCH
from edgemerge.merge import merge
from edgemerge.methods import METHODS
from edgemerge.recipe import make_recipe
from edgemerge.types import Float32, Setting, TensorSpec

__all__ = ["merge_tiny", "use_codecs"]

WIDTH = 256  # a multiple of every block
N_HEADS, N_KV_HEADS = 4, 2
# What makes methods prune, rescale and scale, where they can: that takes every kernel they have.
PARAMETERS: dict[str, Setting] = {
    "density": 0.5,
    "epsilon": 0.1,
    "rescale": True,
    "scale": 0.5,
    "t": 0.5,
}
# Settings that lead to other kernels, rather than to more.
VARIANTS: dict[str, tuple[dict[str, Setting], ...]] = {
    "hierarchical": ({"scope": "tensor"}, {"scope": "row"}),
    **dict.fromkeys(("dare_linear", "della_linear", "breadcrumbs"), ({}, {"density": 1.0})),
}


def use_codecs(read: Sequence[str], written: Sequence[str], weighed: Sequence[str]) -> None:
    """Decode a row of some types, encode one of others, and one by importances of others."""
    values = np.zeros(WIDTH, np.float32)
    for dtype in read:
        CODECS[dtype].decode(np.zeros(row_bytes(dtype, WIDTH), np.uint8), values)
    for dtype in written:
        scratch = np.zeros(CODECS[dtype].scratch_len, np.float32)
        CODECS[dtype].encode(values, np.zeros(row_bytes(dtype, WIDTH), np.uint8), scratch)
    for dtype in weighed:
        scratch = np.zeros(WEIGHTED_SCRATCH, np.float32)
        raw = np.zeros(row_bytes(dtype, WIDTH), np.uint8)
        CODECS[dtype].encode(values, raw, scratch, np.ones(WIDTH, np.float32))


def merge_tiny(method: str, align: str, *, neurons: bool) -> None:
    """Merge models of one layer; the experts' heads and neurons are not in the base's order."""
    row = METHODS[method]
    known = {**row.model_parameters, **row.global_parameters}
    parameters = {key: value for key, value in PARAMETERS.items() if key in known}
    with tempfile.TemporaryDirectory(prefix="edgemerge-") as name:
        folder = Path(name)
        tensors = _random_layer()
        base = _write(folder / "base.gguf", tensors)
        expert = _write(folder / "expert.gguf", _swap_halves(tensors))
        models = [expert, expert] if row.needs_base else [expert, base]
        for variant in VARIANTS.get(method, ({},)):
            recipe = make_recipe(
                method,
                [(str(path), None) for path in models[: row.n_models[1]]],
                base=str(base) if row.needs_base else None,
                parameters={**parameters, **variant},
                out_type="F32",
                align=align,
                neurons=neurons,
            )
            merge(recipe, folder / "out.gguf", force=True)


def _random_layer() -> dict[str, Float32]:
    rng = np.random.default_rng(0)
    rows = {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2, "attn_output": WIDTH}
    rows |= {"ffn_gate": WIDTH, "ffn_up": WIDTH, "ffn_down": WIDTH}
    return {
        f"blk.0.{module}.weight": rng.standard_normal((n, WIDTH), np.float32)
        for module, n in rows.items()
    }


def _swap_halves(tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Let the halves of the heads, and of the neurons, trade places: columns of o and down, else rows."""
    return {
        name: np.roll(x, WIDTH // 2, 1)
        if "output" in name or "down" in name
        else np.roll(x, len(x) // 2, 0)
        for name, x in tensors.items()
    }


def _write(path: Path, tensors: Mapping[str, Float32]) -> Path:
    specs = [TensorSpec(name, x.shape, "F32", x.nbytes) for name, x in tensors.items()]
    metadata = {
        "general.architecture": encode_value("llama", "str"),
        "llama.block_count": encode_value(1, "u32"),
        "llama.attention.head_count": encode_value(N_HEADS, "u32"),
        "llama.attention.head_count_kv": encode_value(N_KV_HEADS, "u32"),
    }
    layout = make_layout(metadata, specs)
    with path.open("wb") as file:
        file.write(layout.header)
        for name, x in tensors.items():
            file.seek(layout.offsets[name])
            file.write(x.tobytes())
        file.truncate(layout.n_bytes)
    return path


def _transport_heads() -> None:
    """Compile the transport itself, which heads that are easy to tell apart do not need."""
    from edgemerge.transport import transport

    transport(np.random.default_rng(0).random((12, 12)))


if __name__ == "__main__":
    method, align, neurons, *types = sys.argv[1:]
    if align != "off":
        _transport_heads()
    use_codecs(*([name for name in names.split(",") if name] for names in types))
    merge_tiny(method, align, neurons=neurons == "on")
