"""The order of feed-forward neurons, another choice that leaves a model's function alone.

Rows of gate and up may be permuted with the columns of down. With them goes what belongs to single neurons:
biases of gate and up, and a norm in front of down. `match_neurons` finds the order that fits a reference best
(Ainsworth et al. 2023, "Git Re-Basin"). With the residual stream fixed, layers do not depend
on one another, so one assignment per layer is exact and none of that paper's alternation is needed. It
matters only for models that were trained apart, and is off unless asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.records import Skipped
from edgemerge.alignment.sketch import check_finite, sketch_key
from edgemerge.alignment.transport import GUARD, assign
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.quants.codec import CODECS
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, Progress, Source

__all__ = ["NeuronPlan", "match_neurons", "neuron_need"]

kernels = KernelFile("heads")

log = logging.getLogger(__name__)

Index: TypeAlias = NDArray[np.int64]

NEURON_SKETCH = 256  # a neuron is one row, not a whole head: 64 would be too noisy
BLOCK_ROWS = 64  # of a feed-forward tensor

# By name without `blk.N.ffn_`: what is permuted along which axis, and what stays as it is.
ROWS = {"gate.weight", "up.weight"}
COLUMNS = {"down.weight", "gate.bias", "up.bias", "sub_norm.weight", "sub_norm.bias"}
STAYS = {"norm.weight", "norm.bias", "down.bias"}
TILE = (32, 256)  # of the matrix of costs that is worked on at a time: fits a second-level cache


@dataclass(frozen=True, slots=True)
class NeuronPlan:
    """The order of one feed-forward layer's neurons that fits a reference best."""

    layer: int
    order: Index = field(repr=False)  # new neuron i is the model's neuron order[i]
    identity_cost: float  # 0 equal, 1 unrelated
    cost: float

    def row_order(self, name: str, n_rows: int) -> Index | None:
        """Rows of gate and up; a fused tensor of both holds the order twice."""
        return self._repeat(n_rows) if self._stem(name) in ROWS else None

    def column_order(self, name: str, n_cols: int) -> Index | None:
        """Columns of down, and elements of vectors."""
        return self._repeat(n_cols) if self._stem(name) in COLUMNS else None

    def _stem(self, name: str) -> str:
        return name.removeprefix(f"blk.{self.layer}.ffn_")

    def _repeat(self, size: int) -> Index:
        n = len(self.order)
        return np.concatenate([self.order + part for part in range(0, size, n)])


def match_neurons(
    reference: Source, other: Source, *, seed: int = 0, progress: Progress | None = None
) -> list[NeuronPlan | Skipped]:
    """Match the feed-forward neurons of every layer with a reference's.

    Maximises the sum of <gate_A,i, gate_B,i> + <up_A,i, up_B,i> + <down_A,i, down_B,i>, each relative to
    its mean norm and seen through sketches, by one linear assignment per layer.

    Parameters
    ----------
    reference, other : Source
        Two models of one architecture; the second is the one to permute.
    seed : int
        Of the sketches.
    progress : callable, optional
        Called with layers done and layers in all, from this thread.

    Returns
    -------
    list of NeuronPlan or Skipped
        One per layer of the other model, in order. Identity where less than `GUARD` is saved.

    Raises
    ------
    FormatError
        A tensor holds NaN or infinity.

    Notes
    -----
    `neuron_need` tells how much memory it takes: 8 n^2 bytes of costs for n neurons, and features.
    """
    plans: list[NeuronPlan | Skipped] = []
    layers = _layers(other)
    for done, layer in enumerate(layers, start=1):
        reason = _cannot_match(reference, other, layer)
        if reason is not None:
            log.info("%s: neurons of layer %d are not matched: %s", other.path, layer, reason)
            plans.append(Skipped(layer, reason))
        else:
            plans.append(_match_layer(reference, other, layer, seed))
        if progress is not None:
            progress(done, len(layers))
    return plans


def neuron_need(reference: Source, other: Source) -> int:
    """Return the bytes that `match_neurons` takes for its widest layer; reads no tensor data."""
    needs = [0]
    for layer in _layers(other):
        if _cannot_match(reference, other, layer) is None:
            down = other.specs()[f"blk.{layer}.ffn_down.weight"]
            n, d = down.n_cols, down.n_rows
            # Features in float32: gate, up and down of two models. Then the sketch of down in float64,
            # and later in its place the features in tiles.
            features = (2 * 3 * 4 + 8) * NEURON_SKETCH * n
            blocks = 2 * BLOCK_ROWS * (4 + 4) * max(n, d)  # two at a time, as stored and decoded
            needs.append(8 * n * n + features + blocks)
    return max(needs)


def _layers(source: Source) -> list[int]:
    return sorted({i for name in source.specs() if (i := layer_index(name)) is not None})


def _cannot_match(reference: Source, other: Source, layer: int) -> str | None:
    prefix = f"blk.{layer}.ffn_"
    stems = {n.removeprefix(prefix) for n in other.specs() if n.startswith(prefix)}
    if unknown := sorted(stems - ROWS - COLUMNS - STAYS):
        return f"how ffn_{unknown[0]} depends on neurons is not known"
    if not {"up.weight", "down.weight"} <= stems:
        return "the layer has no feed-forward part"
    names = {f"{prefix}{stem}" for stem in stems - STAYS}
    for name in names:
        ours, theirs = reference.specs().get(name), other.specs()[name]
        if ours is None or ours.shape != theirs.shape:
            return f"{name} is not alike in the two models"
        if ours.dtype not in CODECS or theirs.dtype not in CODECS:
            return f"{name} is stored in no type of weights"
    n = other.specs()[f"{prefix}down.weight"].n_cols
    for name in names:
        spec = other.specs()[name]
        if (spec.n_rows if name.removeprefix(prefix) in ROWS else spec.n_cols) % n:
            return f"{name} does not belong to {n} neurons"
    return None


def _match_layer(reference: Source, other: Source, layer: int, seed: int) -> NeuronPlan:
    ours = _neuron_features(reference, layer, seed)
    theirs = _neuron_features(other, layer, seed)
    cost = np.zeros((len(ours[0]), len(theirs[0])))
    for a, b in zip(ours, theirs, strict=True):
        scale = math.sqrt(float(np.square(a).sum()) * float(np.square(b).sum())) / len(a)
        _subtract_products(a, b, scale or 1.0, cost)
    order = assign(cost)
    rows = np.arange(len(order))
    costs = [1.0 + float(cost[rows, taken].mean()) / len(ours) for taken in (rows, order)]
    if costs[0] - costs[1] <= GUARD * costs[0]:
        order = rows
    return NeuronPlan(layer, order, costs[0], costs[1])


def _subtract_products(a_f32: Float32, b_f32: Float32, scale: float, cost_f64: Float64) -> None:
    """Subtract A B^T / scale from the costs, tile by tile.

    A product of NumPy's would come from BLAS, whose rounding depends on the processor and on how many
    threads BLAS has.
    """
    height, width = TILE
    columns = [np.ascontiguousarray(part.T) for part in _parts(b_f32, width)]
    for i, rows in enumerate(_parts(a_f32, height)):
        left, out = np.ascontiguousarray(rows.T), cost_f64[i * height :][: len(rows)]
        for j, right in enumerate(columns):
            tile = np.zeros((left.shape[1], right.shape[1]))
            kernels.add_products(left, right, tile)
            out[:, j * width :][:, : right.shape[1]] -= tile / scale


def _parts(x: Float32, height: int) -> Iterator[Float32]:
    for start in range(0, len(x), height):
        yield x[start : start + height]


def _neuron_features(source: Source, layer: int, seed: int) -> list[Float32]:
    """Sketch gate, up and down: for each, a row per neuron."""
    down = source.specs()[f"blk.{layer}.ffn_down.weight"]
    buckets, signs = np.empty(down.n_rows, np.int32), np.empty(down.n_rows)
    kernels.draw_sketch(sketch_key(seed), NEURON_SKETCH, buckets, signs)
    sums, columns = np.empty(NEURON_SKETCH), np.zeros((NEURON_SKETCH, down.n_cols))
    for i, block in enumerate(_blocks(source, down.name, BLOCK_ROWS)):
        kernels.sketch_columns(block.reshape(-1), i * BLOCK_ROWS, buckets, signs, columns)
    features = [np.ascontiguousarray(columns.T, np.float32)]
    check_finite(source, down.name, features[0])
    for part in ("gate", "up"):
        spec = source.specs().get(f"blk.{layer}.ffn_{part}.weight")
        if spec is None:
            continue
        rows = np.empty((spec.n_rows, NEURON_SKETCH), np.float32)
        for i, block in enumerate(_blocks(source, spec.name, BLOCK_ROWS)):
            out = rows[i * BLOCK_ROWS :][: len(block)]
            kernels.sketch_rows(block.reshape(-1), buckets, signs, sums, out)
        check_finite(source, spec.name, rows)
        features += np.split(rows, spec.n_rows // down.n_cols)
    return features


def _blocks(source: Source, name: str, height: int) -> Iterator[Float32]:
    spec = source.specs()[name]
    for start in range(0, spec.n_rows, height):
        n_rows = min(height, spec.n_rows - start)
        raw = np.empty(n_rows * spec.row_bytes, np.uint8)
        values = np.empty((n_rows, spec.n_cols), np.float32)
        source.read_rows(name, start, start + n_rows, raw)
        CODECS[spec.dtype].decode(raw, values.reshape(-1))
        yield values
