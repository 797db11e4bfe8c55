"""Finds the order of one model's attention heads that fits another model, inside a memory budget.

Read top-down. `align_models` takes the layers one by one. Each is read once, block by block, into sketches of
its heads (`edgemerge.kernels.heads`). `edgemerge.alignment.transport` matches heads by the distances of their
sketches. Whole weights are compared: the difference to a base does not tell which head is which. The result
is a plan. `row_order` and `column_order` of `edgemerge.alignment.geometry` tell the merge what to read.

Fine-tunes of one base keep their heads in place. Then every plan is the identity, and aligning changes
nothing. It helps only where heads were permuted, or where models were trained apart.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.geometry import (
    column_mix,
    column_order,
    layer_geometry,
    row_mix,
    row_order,
    row_runs,
)
from edgemerge.alignment.records import HeadPlan, LayerHeads, Skipped
from edgemerge.alignment.rotations import find_rotations, rotation_bytes, rotation_sizes
from edgemerge.alignment.sketch import Sketcher, sketch_bytes, sketched_names
from edgemerge.alignment.transport import match_heads
from edgemerge.budget import Arena
from edgemerge.errors import BudgetError, Stopped
from edgemerge.formats.quants.codec import CODECS
from edgemerge.native import KernelFile
from edgemerge.remote.stand_ins import stop_reading
from edgemerge.sizes import format_size
from edgemerge.types import Float32, Source

__all__ = [
    "SOFT_WARNING",
    "align_models",
    "arena_need",
    "column_mix",
    "column_order",
    "layer_geometry",
    "rotations_need",
    "row_mix",
    "row_order",
    "row_runs",
]

kernels = KernelFile("heads")

Float64: TypeAlias = NDArray[np.float64]

SOFT_WARNING = (
    "soft alignment mixes heads that are hard to tell apart, and a model whose heads are mixed no longer "
    "computes what it did; hard alignment changes no model's function"
)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One layer of the reference, and the layer of the other model that is permuted."""

    models: tuple[tuple[Source, LayerHeads], tuple[Source, LayerHeads]]


def align_models(
    reference: Source,
    other: Source,
    *,
    seed: int = 0,
    arena_bytes: int,
    threads: int = 1,
    layers: Sequence[tuple[int, int]] | None = None,
    on_read: Callable[[int], None] | None = None,
    rotates: bool = False,
) -> list[HeadPlan | Skipped]:
    """Find, for every layer, the permutation of a model's heads that fits a reference best.

    Parameters
    ----------
    reference, other : Source
        Two models of one architecture; the second is the one to permute.
    seed : int
        Of the sketches.
    arena_bytes : int
        Working memory of one thread; `arena_need` says what is least and what is useful.
    threads : int
        Layers at a time; the result depends neither on it nor on `arena_bytes`.
    layers : sequence of (int, int), optional
        Pairs of layers, the reference's and the other's; else every layer with its namesake.
    on_read : callable, optional
        Called with the bytes of every block read, from any thread; may raise to stop.
    rotates : bool
        Find rotations of values too (`edgemerge.alignment.rotations`).

    Returns
    -------
    list of HeadPlan or Skipped
        One per pair, in order. A skipped layer stays as it is.

    Raises
    ------
    BudgetError
        `arena_bytes` does not hold blocks of one row.
    FormatError
        A tensor holds NaN or infinity.
    """
    pairs = _pair_layers(reference, other, layers)
    least, _ = _arena_need(pairs, rotates=rotates)
    if least > arena_bytes:
        raise BudgetError(
            f"aligning heads takes {format_size(least)} of working memory, of which there is "
            f"{format_size(arena_bytes)}; give more memory or turn alignment off",
            needed=least,
            budget=arena_bytes,
        )
    arenas: queue.SimpleQueue[Arena] = queue.SimpleQueue()
    for _ in range(threads):
        arenas.put(Arena(arena_bytes))

    is_stopped = threading.Event()

    def count(n_bytes: int) -> None:
        if is_stopped.is_set():
            raise Stopped
        if on_read is not None:
            on_read(n_bytes)

    def run(pair: _Pair | Skipped) -> HeadPlan | Skipped:
        if isinstance(pair, Skipped):
            return pair
        arena = arenas.get()
        try:
            found = _align_layer(pair, Sketcher(pair.models, seed, arena, arena_bytes, count))
            if rotates:
                found = replace(found, values=find_rotations(pair.models, found, arena, count))
            return found
        finally:
            arenas.put(arena)

    with ThreadPoolExecutor(threads, "edgemerge-align") as executor:
        try:
            return list(executor.map(run, pairs))
        except BaseException:
            is_stopped.set()  # the executor waits for the threads that run
            stop_reading(state.path for source in (reference, other) for state in source.states())
            raise


def arena_need(
    reference: Source,
    other: Source,
    layers: Sequence[tuple[int, int]] | None = None,
    *,
    rotates: bool = False,
) -> tuple[int, int]:
    """Tell which arenas `align_models` can use; reads no tensor data.

    Parameters
    ----------
    reference, other : Source
        As for `align_models`.
    layers : sequence of (int, int), optional
        As for `align_models`.
    rotates : bool
        As for `align_models`.

    Returns
    -------
    least, useful : int
        Bytes per thread: with blocks of one row, and where more memory gains nothing.
    """
    return _arena_need(_pair_layers(reference, other, layers), rotates=rotates)


def rotations_need(
    reference: Source, other: Source, layers: Sequence[tuple[int, int]] | None = None
) -> tuple[int, int]:
    """Count what rotations of values take; reads no tensor data.

    Parameters
    ----------
    reference, other : Source
        As for `align_models`.
    layers : sequence of (int, int), optional
        As for `align_models`.

    Returns
    -------
    kept, read : int
        Bytes of memory until the model is merged, and bytes that are read to find them.
    """
    pairs = [p for p in _pair_layers(reference, other, layers) if isinstance(p, _Pair)]
    needs = [rotation_sizes(pair.models) for pair in pairs]
    return sum(kept for kept, _ in needs), sum(read for _, read in needs)


def _arena_need(pairs: Sequence[_Pair | Skipped], *, rotates: bool) -> tuple[int, int]:
    needs = [(0, 0)]
    for pair in pairs:
        if isinstance(pair, _Pair):
            needs.append(sketch_bytes(pair.models))
            if rotates:
                needs.append((rotation_bytes(pair.models),) * 2)
    return max(least for least, _ in needs), max(useful for _, useful in needs)


# -- which layers ------------------------------------------------------------------------------------


def _pair_layers(
    reference: Source, other: Source, layers: Sequence[tuple[int, int]] | None
) -> list[_Pair | Skipped]:
    ours = {heads.layer: heads for heads in layer_geometry(reference)}
    theirs = {heads.layer: heads for heads in layer_geometry(other)}
    if layers is None:
        layers = [(layer, layer) for layer in theirs]
    pairs: list[_Pair | Skipped] = []
    for left, right in layers:
        skipped = [h for h in (ours.get(left), theirs.get(right)) if isinstance(h, Skipped)]
        mine, its = ours.get(left), theirs.get(right)
        if skipped:
            pairs.append(Skipped(right, skipped[0].reason))
        elif not isinstance(mine, LayerHeads) or not isinstance(its, LayerHeads):
            pairs.append(Skipped(right, "only one of the models has the layer"))
        else:
            pair = _Pair(((reference, mine), (other, its)))
            reason = _difference(pair)
            pairs.append(pair if reason is None else Skipped(right, reason))
    return pairs


def _difference(pair: _Pair) -> str | None:
    """Say why two layers cannot be compared, if so."""
    cuts = []
    for source, heads in pair.models:
        specs = source.specs()
        stems = {name: name.split(".", 2)[2] for name in heads.axes}
        cuts.append({stems[n]: (axis, specs[n].shape) for n, axis in heads.axes.items()})
        for name in sketched_names(heads):
            if specs[name].dtype not in CODECS:
                return f"{name} is stored as {specs[name].dtype}, which is no type of weights"
    return None if cuts[0] == cuts[1] else "its tensors are cut differently in the two models"


# -- one layer ----------------------------------------------------------------------------------------


def _align_layer(pair: _Pair, sketcher: Sketcher) -> HeadPlan:
    ours, theirs = sketcher.features(0), sketcher.features(1)
    heads = pair.models[1][1]
    head_cost = _distances(ours.q, theirs.q) + _distances(ours.o, theirs.o)
    group_cost = _distances(ours.k, theirs.k) + _distances(ours.v, theirs.v)
    match = match_heads(head_cost, group_cost)
    per_group = heads.n_heads // heads.n_kv_heads
    spread = group_cost.repeat(per_group, axis=0).repeat(per_group, axis=1)
    return HeadPlan(
        geometry=heads,
        reference_layer=pair.models[0][1].layer,
        distances=((head_cost + spread) / 4).astype(np.float32),
        **{field.name: getattr(match, field.name) for field in fields(match)},
    )


def _distances(ours_f32: Float32, theirs_f32: Float32) -> Float64:
    """Squared distances between all heads of two models, relative to the sum of their mean norms."""
    distances = np.empty((len(ours_f32), len(theirs_f32)))
    kernels.squared_distances(ours_f32, theirs_f32, distances)
    norms = np.empty((2, len(ours_f32)))
    kernels.squared_norms(ours_f32, norms[0])
    kernels.squared_norms(theirs_f32, norms[1])
    scale = float(norms.mean(axis=1).sum())
    return distances / scale if scale > 0.0 else distances
