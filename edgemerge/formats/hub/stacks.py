"""Stored tensors that are several in GGUF, or a part of one: halves, stacks of columns, packed experts."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.hub.files import CONFIG
from edgemerge.formats.hub.layouts import BLOCK, Columns, Packed
from edgemerge.formats.hub.safetensors import StoredTensor

__all__ = ["PackedStacks", "dealt_columns", "halve"]

BLOCKS, SCALES = "_blocks", "_scales"


def halve(tensor: StoredTensor) -> tuple[StoredTensor, StoredTensor]:
    """Cut the matrix, or each matrix of a stack, into its upper and lower half.

    What has an odd height is left for the check of shapes.
    """
    *stack, n_rows, n_cols = tensor.shape if len(tensor.shape) > 1 else (1, 1)
    if n_rows % 2:
        return tensor, tensor
    shape = (*stack, n_rows // 2, n_cols)
    upper = StoredTensor(tensor.dtype, shape, tensor.offset, tensor.nbytes // 2)
    n_stacked = prod(stack) or 1
    return upper, replace(upper, offset=tensor.offset + upper.nbytes // n_stacked)


def dealt_columns(
    place: tuple[Path, int], dtype: str, shape: tuple[int, ...], i: int, n: int, *, in_turn: bool
) -> Columns:
    """Return how one of `n` tensors is read whose rows are columns of a stack.

    Parameters
    ----------
    place : (Path, int)
        Shard of the stack, and its offset there.
    dtype : str
        As stored.
    shape : tuple of int
        In GGUF: of matrices (n_experts, out, in), of biases (n_experts, out).
    i, n : int
        Which tensor it is, of how many that are stored as one.
    in_turn : bool
        Whether their columns come in turn, and not one tensor's after the other's.
    """
    n_out, height = shape[1], shape[2] if len(shape) > 2 else 1
    first, step = (i, n) if in_turn else (i * n_out, 1)
    return Columns(place, dtype, height, n * n_out, first, step, n_out)


class PackedStacks:
    """Experts in MXFP4, as gpt-oss stores them: `NAME_blocks` and `NAME_scales`, in any order."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[str, tuple[Path, int]]] = {}  # by name of the stack
        self.is_used = False

    @staticmethod
    def stack_name(name: str) -> str | None:
        """Return the name of the stack that a tensor is a part of; None for any other tensor."""
        return name[: -len(BLOCKS)] if name.endswith((BLOCKS, SCALES)) else None

    def check(
        self, shard: Path, name: str, tensor: StoredTensor, shape: tuple[int, ...], n: int
    ) -> None:
        """Check a part of `n` tensors that have this shape in GGUF.

        Raises
        ------
        FormatError
            It has another type or shape, or rows that are no whole number of blocks.
        """
        n_experts, n_out, n_in = shape
        wanted: tuple[int, ...] = (n_experts, n * n_out, n_in // BLOCK)
        if name.endswith(BLOCKS):
            wanted = (*wanted, BLOCK // 2)
        if n_in % BLOCK:
            raise FormatError(
                f"is MXFP4, but {CONFIG} makes its rows {n_in} weights long, which blocks of {BLOCK} do not "
                "fill; get both files from one model",
                path=shard,
                tensor=name,
            )
        if tensor.dtype != "U8" or tensor.shape != wanted:
            raise FormatError(
                f"it is {tensor.dtype} {list(tensor.shape)}, but {CONFIG} makes it U8 {list(wanted)} in "
                "MXFP4; the two files belong to different models, get the directory again",
                path=shard,
                tensor=name,
            )

    def pair(self, name: str, shard: Path, tensor: StoredTensor, n: int) -> list[Packed]:
        """Add a part; where it is the second, return how each of the `n` tensors is read."""
        stack, start = name[: -len(BLOCKS)], (shard, tensor.offset)
        if stack not in self._waiting:
            self._waiting[stack] = name, start
            return []
        self.is_used = True
        _, other = self._waiting.pop(stack)
        blocks, scales = (start, other) if name.endswith(BLOCKS) else (other, start)
        return [Packed(blocks, scales, first=i, step=n) for i in range(n)]

    def missing(self) -> str | None:
        """Return the name of a part whose other part is there."""
        for stack, (name, _) in self._waiting.items():
            return stack + (SCALES if name.endswith(BLOCKS) else BLOCKS)
        return None
