"""Reading an expert's tensors with heads and neurons in the reference's order.

Hard alignment permutes rows and columns, and changes no value. Rows are read from where they lie in the file.
Columns of o, and elements of biases, are permuted after decoding. Soft alignment sums heads by the weights of
the transport plan. It reads every row that is part of a sum. Rotated values are sums of their group's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.geometry import column_mix, column_order, row_mix, row_order, row_runs
from edgemerge.alignment.neurons import NeuronPlan
from edgemerge.alignment.records import HeadPlan, ValueRotations
from edgemerge.alignment.rotations import value_part
from edgemerge.formats.architectures import layer_index
from edgemerge.native import KernelFile
from edgemerge.types import Float32, InputTensor, TensorSpec

__all__ = ["Permutations", "Reordering", "find_neuron_reordering", "find_reordering"]
__all__ += ["find_reorderings"]

linear, permute = KernelFile("linear"), KernelFile("permute")

# (reference, model, layer of the reference, layer of the model) -> how heads and neurons are permuted
Permutations: TypeAlias = dict[tuple[int, int, int, int], list[HeadPlan | NeuronPlan]]
Index = NDArray[np.int64]
Sparse = tuple[Index, Index, Float32]  # CSR: indptr, indices, weights
# first old row, last + 1, new row of the first (None: only a part of some), values to write
DecodeRows = Callable[[int, int, int | None, Float32], None]


@dataclass(frozen=True, slots=True)
class RowRotation:
    """Rows of one tensor that are values, and how each KV group of them is rotated."""

    matrices: Float32  # (n_groups, length, length)
    groups: tuple[int, ...]  # new group g is made of the model's group groups[g]
    first: int  # first row of the values

    def parts(self, start: int, stop: int) -> list[tuple[int | None, int, int]]:
        """Cut rows [start, stop) into (new group, first row, last + 1); None: no values."""
        length = self.matrices.shape[1]
        last = self.first + len(self.groups) * length
        edges = [self.first + g * length for g in range(len(self.groups))]
        cuts = sorted({start, stop, *(e for e in (*edges, last) if start < e < stop)})
        return [
            ((a - self.first) // length if self.first <= a < last else None, a, b)
            for a, b in pairwise(cuts)
        ]


@dataclass(frozen=True, slots=True)
class ColumnRotation:
    """Columns of one tensor that read values, or elements of a bias that are added to them."""

    matrices: Float32  # (n_groups, length, length)
    per_rotation: int  # consecutive parts of a group: its query heads, or 1
    first: int  # first column


@dataclass(frozen=True, slots=True)
class Reordering:
    """How rows and columns of one tensor of an expert are permuted, summed or rotated."""

    rows: Index | None  # old row of every new row
    row_mix: Sparse | None  # or the sum that every new row is
    columns: Sparse | None
    row_rotation: RowRotation | None = None  # in the place of `rows`, where there are values
    column_rotation: ColumnRotation | None = None  # after `columns`

    def load(
        self,
        start: int,
        stop: int,
        decode: DecodeRows,
        row_f32: Float32,
        spare_f32: Float32,
        out_f32: Float32,
    ) -> None:
        """Fill a block with rows [start, stop) in the new order.

        Parameters
        ----------
        start, stop : int
            New rows.
        decode : callable
            Decodes consecutive old rows into the values it is given.
        row_f32 : (n_cols,) float32
            Working memory.
        spare_f32 : (>= (stop - start) * n_cols,) float32
            Working memory of a soft alignment or of rotations, else empty.
        out_f32 : ((stop - start) * n_cols,) float32
            Written.
        """
        n_cols = row_f32.size
        if self.row_mix is not None:
            self._sum_rows(start, stop, decode, spare_f32, out_f32.reshape(-1, n_cols))
        elif self.row_rotation is not None:
            self._rotate_rows(start, stop, decode, spare_f32, out_f32.reshape(-1, n_cols))
        elif self.rows is not None:
            for at, first, last in row_runs(self.rows, start, stop):
                decode(first, last, start + at, out_f32[at * n_cols : (at + last - first) * n_cols])
        else:
            decode(start, stop, start, out_f32)
        self.order_columns(row_f32, out_f32)

    def order_columns(self, row_f32: Float32, out_f32: Float32) -> None:
        """Bring the columns of rows into the new order, in place.

        Parameters
        ----------
        row_f32 : (n_cols,) float32
            Working memory.
        out_f32 : (n_rows * n_cols,) float32
            Rows, or what belongs to columns, such as their importances.
        """
        if self.columns is not None:
            permute.mix_columns(*self.columns, row_f32, out_f32)
        if (turn := self.column_rotation) is not None:
            permute.rotate_columns(turn.matrices, turn.per_rotation, turn.first, row_f32, out_f32)

    def order_importances(self, row_f32: Float32, out_f32: Float32) -> None:
        """Bring mean squares of what columns read into the new order, in place.

        A rotated number's mean square is taken as `sum_q R[p, q]^2 F[q]`, as if those that it is made of were
        uncorrelated. Parameters are as for `order_columns`.
        """
        turn = self.column_rotation
        if turn is not None:
            turn = replace(turn, matrices=np.square(turn.matrices))
        replace(self, column_rotation=turn).order_columns(row_f32, out_f32)

    def _rotate_rows(
        self, start: int, stop: int, decode: DecodeRows, spare_f32: Float32, out_f32: Float32
    ) -> None:
        """Rotate values, old row after old row; other rows of a fused tensor are permuted."""
        turn = self.row_rotation
        assert turn is not None
        n_cols, length = out_f32.shape[1], turn.matrices.shape[1]
        height = spare_f32.size // n_cols
        for group, first, last in turn.parts(start, stop):
            target = out_f32[first - start : last - start]
            if group is None:
                self._permute_rows(first, last, decode, target)
                continue
            target[:] = 0
            new = first - turn.first - group * length
            old = turn.first + turn.groups[group] * length
            for at in range(0, length, height):
                n_rows = min(height, length - at)
                values = spare_f32[: n_rows * n_cols]
                decode(old + at, old + at + n_rows, None, values)
                permute.add_rotated_rows(
                    turn.matrices[group], new, at, values.reshape(n_rows, n_cols), target
                )

    def _permute_rows(self, start: int, stop: int, decode: DecodeRows, out_f32: Float32) -> None:
        """Load rows around values. They count in no checksum, as the tensor's is not that of its rows."""
        order = np.arange(stop) if self.rows is None else self.rows
        for at, first, last in row_runs(order, start, stop):
            decode(first, last, None, out_f32[at : at + last - first].reshape(-1))

    def _sum_rows(
        self, start: int, stop: int, decode: DecodeRows, spare_f32: Float32, out_f32: Float32
    ) -> None:
        """Sum part by part, in the order of the plan; runs of rows that lie together are one read."""
        assert self.row_mix is not None
        indptr, indices, weights = self.row_mix
        n_cols = out_f32.shape[1]
        out_f32[:] = 0
        counts = np.diff(indptr[start : stop + 1])
        for part in range(int(counts.max(initial=0))):
            has = np.flatnonzero(counts > part)
            entries = indptr[start:stop][has] + part
            steps = (np.diff(has) != 1) | (np.diff(indices[entries]) != 1)
            steps |= np.diff(weights[entries]) != 0
            for run in np.split(np.arange(has.size), np.flatnonzero(steps) + 1):
                if run.size:
                    first, entry = int(has[run[0]]), entries[run[0]]
                    old = int(indices[entry])
                    values = spare_f32[: run.size * n_cols]
                    decode(old, old + run.size, None, values)
                    target = out_f32[first : first + run.size].reshape(-1)
                    linear.add_scaled(values, float(weights[entry]), target)


def find_reorderings(
    permutations: Permutations, inputs: Sequence[InputTensor], *, soft: bool
) -> dict[int, Reordering]:
    """Find the inputs of an output tensor whose rows or columns are permuted: input number -> reordering.

    Parameters
    ----------
    permutations : Permutations
        Of all layers.
    inputs : sequence of InputTensor
        The reference's first.
    soft : bool
        As of `find_reordering`.
    """
    reorderings: dict[int, Reordering] = {}
    first = inputs[0]
    reference = layer_index(first.spec.name)
    for i, tensor in enumerate(inputs):
        layer = layer_index(tensor.spec.name)
        if reference is None or layer is None:
            continue
        for plan in permutations.get((first.model, tensor.model, reference, layer), ()):
            if isinstance(plan, HeadPlan):
                reordering = find_reordering(plan, tensor.spec.name, soft=soft)
            else:
                reordering = find_neuron_reordering(plan, tensor.spec)
            if reordering is not None:
                reorderings[i] = reordering
    return reorderings


def find_reordering(plan: HeadPlan, name: str, *, soft: bool) -> Reordering | None:
    """Say how a tensor of the permuted model is read; None where it stays as it is.

    Parameters
    ----------
    plan : HeadPlan
        Of the tensor's layer.
    name : str
        GGUF name of the tensor in the model that is permuted.
    soft : bool
        Use the transport plan itself instead of its rounding.
    """
    rows = None if soft else row_order(plan, name)
    mix = row_mix(plan, name) if soft else None
    columns = column_mix(plan, name) if soft else _as_mix(column_order(plan, name))
    parts = (rows, mix, columns, *_find_rotations(plan, name))
    return None if all(part is None for part in parts) else Reordering(*parts)


def _find_rotations(plan: HeadPlan, name: str) -> tuple[RowRotation | None, ColumnRotation | None]:
    """Find the values among a tensor's rows, or what reads them among its columns."""
    if not isinstance(plan.values, ValueRotations) or plan.values.matrices is None:
        return None, None
    heads, matrices = plan.geometry, plan.values.matrices
    part = value_part(heads, name)
    if part is not None and heads.axes[name].axis == "rows":
        return RowRotation(matrices, plan.kv_groups, part[0]), None
    if part is not None:
        return None, ColumnRotation(matrices, 1, part[0])
    if name == f"blk.{heads.layer}.attn_output.weight":
        return None, ColumnRotation(matrices, heads.n_heads // heads.n_kv_heads, 0)
    return None, None


def find_neuron_reordering(plan: NeuronPlan, spec: TensorSpec) -> Reordering | None:
    """Say how a feed-forward tensor of the permuted model is read; None where it stays as it is.

    Parameters
    ----------
    plan : NeuronPlan
        Of the tensor's layer.
    spec : TensorSpec
        The tensor in the model that is permuted.
    """
    rows = plan.row_order(spec.name, spec.n_rows)
    columns = _as_mix(plan.column_order(spec.name, spec.n_cols))
    return None if rows is None and columns is None else Reordering(rows, None, columns)


def _as_mix(order: Index | None) -> Sparse | None:
    if order is None:
        return None
    return np.arange(order.size + 1), order, np.ones(order.size, np.float32)
