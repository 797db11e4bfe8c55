"""A tensor in memory as an `arithmetic.BlockStream`: no file, no type, no thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.arithmetic import Block, merged_blocks
from edgemerge.methods.shared_tensor import Team
from edgemerge.methods.table import METHODS, is_plain_sum
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
    ) -> None:
        self.seed = seed
        self._method = METHODS[method]
        self._base = base
        self._values = [x for x, _ in models]
        shape = self._values[0].shape
        spec = TensorSpec(tensor, shape, "F32", 4 * self._values[0].size)
        defaults: dict[str, Any] = {**self._method.model_parameters}
        common: dict[str, Any] = {**self._method.global_parameters}
        self.job = TensorJob(
            out=spec,
            method=method,
            base=None if base is None else InputTensor(0, spec),
            experts=tuple(
                InputTensor(k, spec, {**defaults, **s}) for k, (_, s) in enumerate(models)
            ),
            settings={**common, **options},
            rows_per_block=rows_per_block,
            passes=1,
        )
        self.team = Team(1, self.job.n_blocks).join()

    def blocks(self) -> Iterator[Block]:
        spec = self.job.out
        for number in self.team.take_blocks():
            start = number * self.job.rows_per_block
            part = slice(start * spec.n_cols, (start + self.job.rows_per_block) * spec.n_cols)
            base = None if self._base is None else self._base.ravel()[part].copy()
            experts = np.stack([x.ravel()[part] for x in self._values])
            if self._method.on_deltas and not is_plain_sum(self.job):
                assert base is not None
                experts = experts - base
            yield Block(number, part.start, spec.n_cols, base, experts)

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
) -> Float32:
    """What `arithmetic.merged_blocks` makes of one tensor; same arguments as the twin."""
    stream = MemoryStream(method, base, models, options or {}, rows_per_block, seed, tensor)
    blocks = [values.copy() for _, values in merged_blocks(stream)]
    return np.concatenate(blocks).reshape(models[0][0].shape)
