"""A tensor in memory as a `methods.blocks.BlockStream`: no file, no type, no thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.blocks import Block
from edgemerge.methods.shared_tensor import ThreadGroup
from edgemerge.methods.table import METHODS
from edgemerge.types import InputTensor, TensorJob, TensorSpec

Float32 = NDArray[np.float32]


class MemoryStream:
    """Hands out blocks of whole rows, copied anew for every pass, as no pass may spoil the next."""

    def __init__(
        self,
        method: str,
        base: Float32 | None,
        models: Sequence[tuple[Float32, Mapping[str, Any]]],
        options: Mapping[str, Any],
        rows_per_block: int,
        seed: int,
        tensor: str,
        importances: Sequence[Float32] | None = None,
    ) -> None:
        self.seed = seed
        self._method = METHODS[method]
        self._base = base
        self._values = [x for x, _ in models]
        self._importances = importances
        shape = self._values[0].shape
        spec = TensorSpec(tensor, shape, "F32", 4 * self._values[0].size)
        defaults = self._method.defaults(model=True)
        imatrix = None if importances is None else Path("a matrix")
        self.layer_sum: NDArray[np.float64] | None = None
        self.job = TensorJob(
            out=spec,
            method=method,
            base=None if base is None else InputTensor(0, spec),
            experts=tuple(
                InputTensor(k, spec, {**defaults, **s}, imatrix) for k, (_, s) in enumerate(models)
            ),
            settings={**self._method.defaults(model=False), **options},
            rows_per_block=rows_per_block,
            passes=1,
        )
        self.group = ThreadGroup(1, self.job.n_blocks).join()

    def blocks(self) -> Iterator[Block]:
        spec = self.job.out
        for number in self.group.take_blocks():
            start = number * self.job.rows_per_block
            part = slice(start * spec.n_cols, (start + self.job.rows_per_block) * spec.n_cols)
            yield self._block(number, part)

    def _block(self, number: int, part: slice) -> Block:
        base = None if self._base is None else self._base.ravel()[part].copy()
        experts = np.stack([x.ravel()[part] for x in self._values])
        if self._method.takes_deltas(self.job):
            assert base is not None
            experts = experts - base
        return Block(number, part.start, self.job.out.n_cols, base, experts)

    def sample(self, n_rows: int) -> Iterator[Block]:
        """Rows evenly spaced over the tensor: numbers i * total // count."""
        spec = self.job.out
        count = min(n_rows, spec.n_rows)
        for i in range(count):
            row = i * spec.n_rows // count
            yield self._block(0, slice(row * spec.n_cols, (row + 1) * spec.n_cols))

    def read_importances(self, k: int, out_f32: Float32) -> None:
        assert self._importances is not None
        out_f32[:] = self._importances[k]

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Memory full of rubbish."""
        return np.frombuffer(
            bytearray(b"\xa5" * (int(np.prod(shape)) * np.dtype(dtype).itemsize)), dtype
        ).reshape(shape)


def merge_in_memory(
    method: str,
    base: Float32 | None,
    models: Sequence[tuple[Float32, Mapping[str, Any]]],
    options: Mapping[str, Any] | None = None,
    *,
    rows_per_block: int = 1 << 20,
    seed: int = 0,
    tensor: str = "",
    importances: Sequence[Float32] | None = None,
) -> Float32:
    """What `Method.blocks` makes of one tensor; same arguments as the twin.

    `importances` has (n_matrices, n_cols) for each model.
    """
    stream = MemoryStream(
        method, base, models, options or {}, rows_per_block, seed, tensor, importances
    )
    blocks = [values.copy() for _, values in METHODS[method].blocks(stream)]
    return np.concatenate(blocks).reshape(models[0][0].shape)
