"""Brings the residual stream of one model into another's order: what `--align full` does not do.

A model computes the same function when the dimensions of its residual stream are permuted, in every tensor.
They may even be rotated, once the gains of all norms are multiplied into the matrices that read them. Both
are found here by the weights. First the embeddings tell, as the vocabulary ties them. Then all tensors do, of
a copy whose heads, values and neurons are aligned already: the alternation of Git Re-Basin (Ainsworth et al.
2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Tensors = dict[str, NDArray[Any]]
READS = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "output", "token_embd")  # by columns
WRITES = ("attn_output", "ffn_down")  # by rows
READERS = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}
READERS |= {"output_norm": ("output",)}
BOTH_ENDS = ("output", "token_embd")
ROUNDS = 3


def read(path: Path) -> Tensors:
    """Return all tensors of an F32 GGUF, rows first."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def rewrite(source: Path, target: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Copy an F32 GGUF with other values."""
    target.write_bytes(source.read_bytes())
    out = np.memmap(target, mode="r+", dtype=np.uint8)
    for tensor in gguf.GGUFReader(source).tensors:
        raw = np.ascontiguousarray(tensors[tensor.name], np.float32).view(np.uint8).reshape(-1)
        out[tensor.data_offset : tensor.data_offset + raw.size] = raw
    out.flush()


def fold_norms(tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """Multiply the gains of norms into the matrices behind them: the function stays."""
    folded = dict(tensors)
    for name, gains in tensors.items():
        module = _module(name)
        for reader in READERS.get(module, ()):
            behind = name.replace(module, reader)
            folded[behind] = folded[behind] * gains
            folded[name] = np.ones_like(gains)
    return folded


def turn(tensors: Mapping[str, NDArray[Any]], matrix: NDArray[Any]) -> Tensors:
    """Multiply the residual stream by an orthogonal matrix; gains must be ones unless it permutes."""
    turned = {}
    for name, x in tensors.items():
        if _module(name) in WRITES:
            turned[name] = (matrix @ x.astype(np.float64)).astype(np.float32)
        elif _module(name) in READS:
            turned[name] = (x.astype(np.float64) @ matrix.T).astype(np.float32)
        else:
            turned[name] = x if (x == 1.0).all() else (matrix @ x).astype(np.float32)
    return turned


def match(
    ours: Mapping[str, NDArray[Any]],
    theirs: Mapping[str, NDArray[Any]],
    *,
    rotates: bool,
    only: tuple[str, ...] = (*READS, *WRITES),
) -> NDArray[Any]:
    """Find the orthogonal matrix, or the permutation, that brings `theirs` closest to `ours`."""
    total: NDArray[Any] | float = 0.0
    for name, a in ours.items():
        if _module(name) in only:
            b = theirs[name].astype(np.float64)
            scale = np.linalg.norm(a) * np.linalg.norm(b)
            product = a.T @ b if _module(name) in READS else a @ b.T
            total = total + product / scale
    total = np.asarray(total)
    if rotates:
        left, _, right = np.linalg.svd(total)
        return np.asarray(left @ right)
    matrix = np.zeros_like(total)
    matrix[linear_sum_assignment(-total)] = 1.0
    return matrix


def match_residual(
    a: Path,
    b: Path,
    folder: Path,
    align: Callable[[Path, Path, Path], None],
    *,
    rotates: bool,
) -> tuple[Path, Path]:
    """Write both models with the residual stream of the second in the order of the first's.

    Parameters
    ----------
    a, b : Path
        F32 GGUF files of one shape, with an output matrix of its own.
    folder : Path
        Where to write.
    align : callable
        Writes the second model, aligned to the first, to the third path.
    rotates : bool
        Rotate instead of permute; then the norms of both have gains of one.
    """
    paths = folder / f"{rotates}-a.gguf", folder / f"{rotates}-b.gguf"
    ours, theirs = read(a), read(b)
    if rotates:
        ours, theirs = fold_norms(ours), fold_norms(theirs)
    rewrite(a, paths[0], ours)
    theirs = turn(theirs, match(ours, theirs, rotates=rotates, only=BOTH_ENDS))
    rewrite(b, paths[1], theirs)
    aligned = folder / "aligned.gguf"
    for _ in range(ROUNDS):
        align(*paths, aligned)
        theirs = read(aligned)
        theirs = turn(theirs, match(ours, theirs, rotates=rotates))
        rewrite(b, paths[1], theirs)
    return paths


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
