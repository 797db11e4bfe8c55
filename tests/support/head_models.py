"""Models in memory with attention heads to shuffle, and the shuffling, written independently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.types import FileState, TensorSpec

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]


class ArraySource:
    """A `Source` over float32 arrays."""

    def __init__(
        self,
        tensors: Mapping[str, Float32],
        *,
        architecture: str = "llama",
        dtype: str = "F32",
        **settings: Any,  # int, float or list of int
    ) -> None:
        self.path = Path("memory")
        self.architecture = architecture
        self.tensors = {k: np.array(v, np.float32, order="C") for k, v in tensors.items()}
        self._specs = {k: TensorSpec(k, v.shape, dtype, v.nbytes) for k, v in self.tensors.items()}
        self._metadata = {
            f"{architecture}.{key.replace('attention_', 'attention.')}": encode_value(
                value,
                "[u32]" if isinstance(value, list) else "u32" if isinstance(value, int) else "f32",
            )
            for key, value in settings.items()
        }
        self.reads: list[tuple[str, int, int]] = []

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        return self._metadata

    def notes(self) -> Sequence[str]:
        return ()

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        self.reads.append((name, start, stop))
        rows = self.tensors[name].reshape(-1, self._specs[name].n_cols)
        out_u8[:] = rows[start:stop].reshape(-1).view(np.uint8)

    def forget(self, name: str, n_rows: int | None = None) -> None:
        pass

    def states(self) -> Sequence[FileState]:
        return ()

    def work_bytes(self) -> int:
        return 0

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        pass


def head_tensors(
    n_heads: int,
    n_kv: int,
    *,
    n_embd: int = 48,
    key: int = 8,
    value: int = 8,
    layers: int = 1,
    seed: int = 0,
) -> dict[str, Float32]:
    """Random q, k, v, o of some layers."""
    rng = np.random.default_rng(seed)
    shapes = {
        "attn_q": (n_heads * key, n_embd),
        "attn_k": (n_kv * key, n_embd),
        "attn_v": (n_kv * value, n_embd),
        "attn_output": (n_embd, n_heads * value),
    }
    return {
        f"blk.{layer}.{module}.weight": rng.standard_normal(shape).astype(np.float32)
        for layer in range(layers)
        for module, shape in shapes.items()
    }


def random_order(n_heads: int, n_kv: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """A legal shuffle: of groups, and of heads inside each; old index by new place."""
    r = n_heads // n_kv
    groups = [int(g) for g in rng.permutation(n_kv)]
    return groups, [g * r + int(j) for g in groups for j in rng.permutation(r)]


def take_blocks(x: Float32, order: list[int], axis: int) -> Float32:
    """Put equal blocks of an axis into another order."""
    return np.concatenate([np.split(x, len(order), axis)[i] for i in order], axis)


def shuffle(
    tensors: Mapping[str, Float32], groups: list[int], heads: list[int]
) -> dict[str, Float32]:
    """Move heads: rows of q by `heads`, of k and v by `groups`, columns of o by `heads`."""
    moved = {}
    for name, x in tensors.items():
        module = name.split(".")[2]
        if module in ("attn_q", "attn_sinks", "attn_q_norm"):
            moved[name] = take_blocks(x, heads, 0)
        elif module in ("attn_k", "attn_v", "attn_k_norm"):
            moved[name] = take_blocks(x, groups, 0)
        elif module == "attn_output" and x.ndim == 2:
            moved[name] = take_blocks(x, heads, 1)
        else:
            moved[name] = x
    return moved


def rotate_values(
    tensors: Mapping[str, Float32], layer: int, n_heads: int, n_kv: int, rng: np.random.Generator
) -> dict[str, Float32]:
    """Rotate the values of every group at random, and o back."""
    turned, prefix = dict(tensors), f"blk.{layer}.attn_"
    length = len(tensors[f"{prefix}v.weight"]) // n_kv
    matrices = [np.linalg.qr(rng.standard_normal((length, length)))[0] for _ in range(n_kv)]
    for name in (f"{prefix}v.weight", f"{prefix}v.bias"):
        if name in tensors:
            parts = np.split(tensors[name].astype(np.float64), n_kv)
            whole = np.concatenate([m @ part for m, part in zip(matrices, parts, strict=True)])
            turned[name] = whole.astype(np.float32)
    parts = np.split(tensors[f"{prefix}output.weight"].astype(np.float64), n_heads, axis=1)
    wide = [part @ matrices[h * n_kv // n_heads].T for h, part in enumerate(parts)]
    turned[f"{prefix}output.weight"] = np.concatenate(wide, axis=1).astype(np.float32)
    return turned
