"""One layer's attention heads as short feature vectors, streamed through an arena block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.records import LayerHeads
from edgemerge.budget import ALIGNMENT, TARGET_ELEMENTS, Arena, aligned
from edgemerge.errors import FormatError
from edgemerge.formats.quants.codec import CODECS
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Source, TensorSpec

__all__ = [
    "Features",
    "Sketcher",
    "check_finite",
    "sketch_bytes",
    "sketch_key",
    "sketched_names",
]

kernels = KernelFile("heads")

SKETCH = 64  # s; finds heads through noise of 4 times the weights' size, 16 only through 2
ROW_MODULES = ("attn_qkv", "attn_q", "attn_k", "attn_v")  # rows in the order of a fused tensor
O_MODULE = "attn_output"


@dataclass(frozen=True, slots=True)
class Features:
    """Sketches of one layer, a row per head (q, o) or KV group (k, v); float32."""

    q: Float32  # (n_heads, key_length * s)
    k: Float32  # (n_kv_heads, key_length * s)
    v: Float32  # (n_kv_heads, value_length * s)
    o: Float32  # (n_heads, s * value_length)


def sketched_names(heads: LayerHeads) -> list[str]:
    """List the tensors that are read: the projections, and the biases of q, k and v."""
    stems = [f"{module}.{suffix}" for module in ROW_MODULES for suffix in ("weight", "bias")]
    names = [f"blk.{heads.layer}.{stem}" for stem in (*stems, f"{O_MODULE}.weight")]
    return [name for name in names if name in heads.axes]


def sketch_bytes(models: Sequence[tuple[Source, LayerHeads]]) -> tuple[int, int]:
    """Size the arena for one layer of some models, which are cut alike.

    Parameters
    ----------
    models : sequence of (Source, LayerHeads)
        All whose features are to be in memory together.

    Returns
    -------
    least, useful : int
        Bytes with blocks of one row, and with blocks that more memory would not improve.
    """
    specs = [source.specs()[name] for source, heads in models for name in sketched_names(heads)]
    fixed = _fixed_bytes(models[0][1], _width(specs), len(models))
    return (
        fixed + max(_block_bytes(spec, 1) for spec in specs),
        fixed + max(_block_bytes(spec, _useful_rows(spec)) for spec in specs),
    )


def sketch_key(seed: int) -> np.uint64:
    """Hash a recipe's seed into the key of `kernels.draw_sketch`."""
    digest = hashlib.blake2b(f"{seed}|heads".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _width(specs: Sequence[TensorSpec]) -> int:
    """Count the entries of the projection: the model dimension, and one for biases."""
    return 1 + max(n for spec in specs if len(spec.shape) > 1 for n in spec.shape)


def _fixed_bytes(heads: LayerHeads, width: int, n_models: int) -> int:
    n_columns = heads.n_heads * heads.value_length
    shared = aligned(4 * width) + aligned(8 * width) + aligned(8 * SKETCH)
    shared += aligned(8 * SKETCH * n_columns)
    own = aligned(4 * SKETCH * _n_rows(heads)) + aligned(4 * SKETCH * n_columns)
    return shared + n_models * own


def _n_rows(heads: LayerHeads) -> int:
    groups = heads.n_kv_heads * (heads.key_length + heads.value_length)
    return heads.n_heads * heads.key_length + groups


def _block_bytes(spec: TensorSpec, rows: int) -> int:
    return aligned(rows * spec.row_bytes) + aligned(4 * rows * spec.n_cols)


def _useful_rows(spec: TensorSpec) -> int:
    return min(spec.n_rows, max(1, TARGET_ELEMENTS // max(1, spec.n_cols)))


def check_finite(source: Source, name: str, sketch_f32: Float32) -> None:
    """Refuse a tensor whose sketch is not finite: then it is not either.

    Raises
    ------
    FormatError
        Names the file and the tensor.
    """
    if not np.isfinite(sketch_f32).all():
        raise FormatError(
            "holds NaN or infinity; that model is damaged, get it again",
            path=source.path,
            tensor=name,
        )


class Sketcher:
    """Makes the features of one layer of several models, all in the same projection.

    Parameters
    ----------
    models : sequence of (Source, LayerHeads)
        As for `sketch_bytes`.
    seed : int
        Of the projection, which is the same for all layers and models.
    arena : Arena
        Emptied; holds everything, the features too.
    arena_bytes : int
        Its size, at least the `least` of `sketch_bytes`.
    on_read : callable, optional
        Called with the bytes of every block read; may raise to stop.
    """

    def __init__(
        self,
        models: Sequence[tuple[Source, LayerHeads]],
        seed: int,
        arena: Arena,
        arena_bytes: int,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        self._models = models
        self._arena = arena
        self._on_read = on_read
        arena.reset()
        specs = [source.specs()[name] for source, heads in models for name in sketched_names(heads)]
        heads, width = models[0][1], _width(specs)
        self._buckets = self._take((width,), np.int32)
        self._signs = self._take((width,), np.float64)
        self._sums = self._take((SKETCH,), np.float64)
        self._columns = self._take((SKETCH, heads.n_heads * heads.value_length), np.float64)
        self._rows = [self._take((_n_rows(heads), SKETCH), np.float32) for _ in models]
        self._outs = [
            self._take((heads.n_heads, SKETCH, heads.value_length), np.float32) for _ in models
        ]
        free = arena_bytes - _fixed_bytes(heads, width, len(models))
        self._block = self._take((free,), np.uint8)
        kernels.draw_sketch(sketch_key(seed), SKETCH, self._buckets, self._signs)

    def features(self, i: int) -> Features:
        """Read the layer of model i once, and return views of its features in the arena.

        Parameters
        ----------
        i : int
            Index in `models`.

        Raises
        ------
        FormatError
            A tensor holds NaN or infinity.
        """
        source, heads = self._models[i]
        rows, out = self._rows[i], self._outs[i]
        n_done = 0
        for name in sketched_names(heads):
            spec = source.specs()[name]
            if name.endswith(f"{O_MODULE}.weight"):
                self._sketch_columns(source, spec)
                by_head = self._columns.reshape(SKETCH, heads.n_heads, heads.value_length)
                out[:] = by_head.transpose(1, 0, 2)
                check_finite(source, name, out)
                continue
            if name.endswith(".weight"):
                part = rows[n_done : n_done + spec.n_rows]
                self._sketch_rows(source, spec, part)
                n_done += spec.n_rows
            else:  # a bias is one more column of the weight before it, with an entry of its own
                _, bias = next(self._blocks(source, spec))
                part = rows[n_done - spec.n_cols : n_done]
                part[:, self._buckets[-1]] += np.float32(self._signs[-1]) * bias
            check_finite(source, name, part)
        q, k, v = np.split(rows, np.cumsum([heads.n_heads, heads.n_kv_heads]) * heads.key_length)
        return Features(
            q.reshape(heads.n_heads, -1),
            k.reshape(heads.n_kv_heads, -1),
            v.reshape(heads.n_kv_heads, -1),
            out.reshape(heads.n_heads, -1),
        )

    def _sketch_rows(self, source: Source, spec: TensorSpec, out_f32: Float32) -> None:
        buckets, signs = self._buckets[: spec.n_cols], self._signs[: spec.n_cols]
        for start, values in self._blocks(source, spec):
            stop = start + values.size // spec.n_cols
            kernels.sketch_rows(values, buckets, signs, self._sums, out_f32[start:stop])

    def _sketch_columns(self, source: Source, spec: TensorSpec) -> None:
        self._columns[:] = 0.0
        for start, values in self._blocks(source, spec):
            kernels.sketch_columns(values, start, self._buckets, self._signs, self._columns)

    def _blocks(self, source: Source, spec: TensorSpec) -> Iterator[tuple[int, Float32]]:
        """Yield first row and values of blocks, in row order, as high as the arena allows."""
        spare = self._block.size - 2 * ALIGNMENT
        fits = spare // (spec.row_bytes + 4 * spec.n_cols)
        height = max(1, min(fits, _useful_rows(spec)))
        for start in range(0, spec.n_rows, height):
            n_rows = min(height, spec.n_rows - start)
            raw = self._block[: n_rows * spec.row_bytes]
            values = self._block[aligned(raw.size) :][: 4 * n_rows * spec.n_cols].view(np.float32)
            source.read_rows(spec.name, start, start + n_rows, raw)
            if self._on_read is not None:
                self._on_read(raw.nbytes)
            CODECS[spec.dtype].decode(raw, values)
            yield start, values

    def _take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        return self._arena.take(shape, dtype)
