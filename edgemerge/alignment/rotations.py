"""Rotations of values, which leave a layer's function alone: attention only averages values.

The values of a KV group may be multiplied by any orthogonal matrix, if the columns of o that read them are
multiplied too. Two models that were trained apart choose these matrices apart. `find_rotations` takes those
that fit a reference best. It matters only for such models, and is off unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.records import HeadPlan, LayerHeads, Skipped, ValueRotations
from edgemerge.alignment.sketch import check_finite
from edgemerge.alignment.transport import GUARD
from edgemerge.budget import Arena, aligned
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.quants.codec import CODECS
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Source

__all__ = ["find_rotations", "rotation_bytes", "rotation_sizes", "value_part"]

heads_kernels, small = KernelFile("heads"), KernelFile("small_matrices")

Float64: TypeAlias = NDArray[np.float64]
Models: TypeAlias = tuple[tuple[Source, LayerHeads], tuple[Source, LayerHeads]]

ROWS = 32  # of o at a time; the sums do not depend on the arena
COLUMNS = 64  # of v at a time
SINGULAR = (
    1e-12  # squared singular value, relative to the largest, below which its digits are noise
)
POLISHES = 4  # each doubles the digits to which R is orthogonal
MATRICES = 8  # of value_length squared, float64, that `_nearest_rotation` works in


def _why_not(models: Models) -> str | None:
    """Say why the values of two layers may not be rotated; None where they may."""
    source, heads = models[1]
    if any(".attn_sub_norm." in name for name in heads.axes):
        return "what o reads is scaled number by number"
    for source, _ in models:
        if get_value(source.metadata(), f"{source.architecture}.attention.clamp_kqv"):
            return "values are clamped number by number"
    return None


def value_part(heads: LayerHeads, name: str) -> tuple[int, int] | None:
    """Find the values in a tensor's rows, or in the elements of a bias: the first of them, and their number.

    None for a tensor without values.
    """
    n_values = heads.n_kv_heads * heads.value_length
    module = name.split(".")[2]
    if name not in heads.axes or module not in ("attn_v", "attn_qkv"):
        return None
    first = (heads.n_heads + heads.n_kv_heads) * heads.key_length if module == "attn_qkv" else 0
    return first, n_values


def rotation_bytes(models: Models) -> int:
    """Count the bytes that `find_rotations` needs, most of them in its arena; it cannot use more."""
    heads = models[0][1]
    fixed = aligned(8 * (heads.n_kv_heads + MATRICES) * heads.value_length**2)
    return fixed + sum(_block_bytes(source, own) for source, own in models)


def rotation_sizes(models: Models) -> tuple[int, int]:
    """Count the bytes of two layers' rotations, and those that are read to find them."""
    if _why_not(models) is not None:
        return 0, 0
    heads, read = models[1][1], 0
    for source, own in models:
        v, o = source.specs()[_value_name(source, own)], source.specs()[_output_name(own)]
        read += heads.n_kv_heads * heads.value_length * v.row_bytes + o.nbytes
    return 4 * heads.n_kv_heads * heads.value_length**2, read


def _block_bytes(source: Source, heads: LayerHeads) -> int:
    v, o = source.specs()[_value_name(source, heads)], source.specs()[_output_name(heads)]
    blocks = ((v, heads.value_length), (o, ROWS))
    raw = max(aligned(n * spec.row_bytes) for spec, n in blocks)
    return raw + max(aligned(4 * n * spec.n_cols) for spec, n in blocks)


def find_rotations(
    models: Models,
    plan: HeadPlan,
    arena: Arena,
    on_read: Callable[[int], None],
    guard: float = GUARD,
) -> ValueRotations | Skipped:
    """Find the rotation R of every KV group that brings its values closest to the reference's.

    Minimises |V_A - R V_B|^2 + sum_h |O_A,h - O_B,h R^T|^2 over the query heads h of the group: the
    orthogonal Procrustes problem (Schoenemann 1966). R is the orthogonal polar factor of
    V_A V_B^T + sum_h O_A,h^T O_B,h, which is summed row by row in float64.

    Parameters
    ----------
    models : two of (Source, LayerHeads)
        The reference's layer and the other's, which are cut alike.
    plan : HeadPlan
        The order of the other's heads, which comes first.
    arena : Arena
        Emptied; of `rotation_bytes` at least.
    on_read : callable
        Called with the bytes of every block read; may raise to stop.
    guard : float
        Values stay as they are unless rotating saves at least this share of the cost.

    Returns
    -------
    ValueRotations or Skipped
        The second where the layer's function would change.

    Raises
    ------
    FormatError
        A tensor holds NaN or infinity.
    """
    if (reason := _why_not(models)) is not None:
        return Skipped(models[1][1].layer, reason)
    heads = models[0][1]
    length, n_groups = heads.value_length, heads.n_kv_heads
    arena.reset()
    products = arena.take((n_groups, length, length), np.float64).view(np.float64)
    products[:] = 0.0
    readers = [_Reader(source, own, arena, on_read) for source, own in models]
    norms = _add_values(readers, plan, products) + _add_outputs(readers, plan, products)
    matrices = np.empty(products.shape, np.float32)
    gained, kept = [], []
    for group, product in enumerate(products):
        rotation = _nearest_rotation(product)
        gained.append(math.fsum((rotation * product).ravel()))
        kept.append(math.fsum(product.diagonal()))
        matrices[group] = rotation
    costs = [
        max(0.0, 1.0 - 2.0 * math.fsum(found) / norms) if norms > 0.0 else 0.0
        for found in (kept, gained)
    ]
    helps = costs[0] - costs[1] > guard * costs[0]
    return ValueRotations(costs[0], costs[1], matrices if helps else None)


# -- the products ------------------------------------------------------------------------------------


class _Reader:
    """Reads values and rows of o of one model into its part of the arena."""

    def __init__(
        self, source: Source, heads: LayerHeads, arena: Arena, on_read: Callable[[int], None]
    ) -> None:
        self.source, self.heads, self._on_read = source, heads, on_read
        names = ((_value_name(source, heads), heads.value_length), (_output_name(heads), ROWS))
        blocks = [(source.specs()[name], n) for name, n in names]
        raw = max(n * spec.row_bytes for spec, n in blocks)
        self._raw = arena.take((raw,), np.uint8).view(np.uint8)
        size = max(n * spec.n_cols for spec, n in blocks)
        self._values = arena.take((size,), np.float32).view(np.float32)

    def read(self, name: str, start: int, stop: int) -> Float32:
        """Decode rows [start, stop); they are valid until the next call."""
        spec = self.source.specs()[name]
        raw = self._raw[: (stop - start) * spec.row_bytes]
        values = self._values[: (stop - start) * spec.n_cols]
        self.source.read_rows(name, start, stop, raw)
        self._on_read(raw.nbytes)
        CODECS[spec.dtype].decode(raw, values)
        check_finite(self.source, name, values)
        return values.reshape(stop - start, spec.n_cols)

    def values(self, group: int) -> Float32:
        """Return (value_length, width) values of a group."""
        name = _value_name(self.source, self.heads)
        part = value_part(self.heads, name)
        assert part is not None
        first = part[0] + group * self.heads.value_length
        return self.read(name, first, first + self.heads.value_length)

    def bias(self, group: int) -> Float32 | None:
        """Return a group's part of the values' bias, (1, value_length), if there is one."""
        name = _value_name(self.source, self.heads).replace(".weight", ".bias")
        part = value_part(self.heads, name)
        if part is None:
            return None
        spec = self.source.specs()[name]
        raw, values = np.empty(spec.nbytes, np.uint8), np.empty(spec.n_cols, np.float32)
        self.source.read_rows(name, 0, 1, raw)
        CODECS[spec.dtype].decode(raw, values)
        check_finite(self.source, name, values)
        first = part[0] + group * self.heads.value_length
        return values[first : first + self.heads.value_length].reshape(1, -1)


def _add_values(readers: Sequence[_Reader], plan: HeadPlan, products_f64: Float64) -> float:
    """Add V_A V_B^T of every group; return the sum of squares of both."""
    norms = []
    for group, theirs in enumerate(plan.kv_groups):
        pair = [readers[0].values(group), readers[1].values(theirs)]
        norms += [_squares(x) for x in pair]
        for start in range(0, pair[0].shape[1], COLUMNS):
            tiles = [np.ascontiguousarray(x[:, start : start + COLUMNS].T) for x in pair]
            heads_kernels.add_products(*tiles, products_f64[group])
        biases = [readers[0].bias(group), readers[1].bias(theirs)]
        if biases[0] is not None and biases[1] is not None:
            norms += [_squares(x) for x in biases if x is not None]
            heads_kernels.add_products(*biases, products_f64[group])
    return math.fsum(norms)


def _add_outputs(readers: Sequence[_Reader], plan: HeadPlan, products_f64: Float64) -> float:
    """Add O_A,h^T O_B,h of every head to its group; return the sum of squares of both."""
    heads, norms = readers[0].heads, []
    per_group = heads.n_heads // heads.n_kv_heads
    n_rows = readers[0].source.specs()[_output_name(heads)].n_rows
    for start in range(0, n_rows, ROWS):
        stop = min(start + ROWS, n_rows)
        pair = [r.read(_output_name(r.heads), start, stop) for r in readers]
        norms += [_squares(x) for x in pair]
        for head, theirs in enumerate(plan.heads):
            tiles = _columns(pair, (head, theirs), heads.value_length)
            heads_kernels.add_products(*tiles, products_f64[head // per_group])
    return math.fsum(norms)


def _columns(pair: Sequence[Float32], heads: Sequence[int], length: int) -> Iterator[Float32]:
    for x, head in zip(pair, heads, strict=True):
        yield np.ascontiguousarray(x[:, head * length : (head + 1) * length])


def _squares(x_f32: Float32) -> float:
    norms = np.empty(len(x_f32))
    heads_kernels.squared_norms(np.ascontiguousarray(x_f32), norms)
    return math.fsum(norms)


def _value_name(source: Source, heads: LayerHeads) -> str:
    name = f"blk.{heads.layer}.attn_v.weight"
    return name if name in source.specs() else f"blk.{heads.layer}.attn_qkv.weight"


def _output_name(heads: LayerHeads) -> str:
    return f"blk.{heads.layer}.attn_output.weight"


# -- the nearest rotation ----------------------------------------------------------------------------


def _nearest_rotation(product_f64: Float64) -> Float64:
    """Return M (M^T M)^(-1/2), the orthogonal matrix nearest to M; the identity where M is singular.

    The square loses half of the digits. A few steps of Newton and Schulz (Bjoerck and Bowie 1971),
    R <- (3 R - R R^T R) / 2, give them back. No LAPACK: its last digits depend on the processor.
    """
    n = len(product_f64)
    largest = float(np.abs(product_f64).max())
    if largest == 0.0:
        return np.eye(n)
    m = product_f64 / largest
    square, vectors, out = np.empty((n, n)), np.empty((n, n)), np.empty((n, n))
    small.multiply(np.ascontiguousarray(m.T), m, square)
    small.decompose(square, vectors)
    sizes = square.diagonal().copy()
    if sizes.min() <= SINGULAR * sizes.max():
        return np.eye(n)
    weighted = np.ascontiguousarray(vectors.T / np.sqrt(sizes))
    small.multiply(weighted, vectors, square)
    small.multiply(m, square, out)
    for _ in range(POLISHES):
        small.multiply(np.ascontiguousarray(out.T), out, square)
        small.multiply(out, 3.0 * np.eye(n) - square, vectors)
        out[:] = vectors / 2.0
    return out
