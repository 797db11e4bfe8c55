"""Reading an expert's tensors with heads and neurons in the reference's order.

Hard alignment permutes rows and columns, and changes no value. Rows are read from where they lie in the file.
Columns of o, and elements of biases, are permuted after decoding. Soft alignment sums heads by the weights of
the transport plan. It reads every row that is part of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.geometry import column_mix, column_order, row_mix, row_order, row_runs
from edgemerge.alignment.neurons import NeuronPlan
from edgemerge.alignment.records import HeadPlan
from edgemerge.formats.architectures import layer_index
from edgemerge.native import KernelFile
from edgemerge.types import Float32, InputTensor

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
class Reordering:
    """How rows and columns of one tensor of an expert are permuted or summed."""

    rows: Index | None  # old row of every new row
    row_mix: Sparse | None  # or the sum that every new row is
    columns: Sparse | None

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
            Working memory of a soft alignment, else empty.
        out_f32 : ((stop - start) * n_cols,) float32
            Written.
        """
        n_cols = row_f32.size
        if self.row_mix is not None:
            self._sum_rows(start, stop, decode, spare_f32, out_f32.reshape(-1, n_cols))
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
                reordering = find_neuron_reordering(plan, tensor.spec.name, tensor.spec.n_rows)
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
    if rows is None and mix is None and columns is None:
        return None
    return Reordering(rows, mix, columns)


def find_neuron_reordering(plan: NeuronPlan, name: str, n_rows: int) -> Reordering | None:
    """Say how a feed-forward tensor of the permuted model is read; None where it stays as it is.

    Parameters
    ----------
    plan : NeuronPlan
        Of the tensor's layer.
    name : str
        GGUF name of the tensor in the model that is permuted.
    n_rows : int
        Its rows.
    """
    rows, columns = plan.row_order(name, n_rows), _as_mix(plan.column_order(name))
    return None if rows is None and columns is None else Reordering(rows, None, columns)


def _as_mix(order: Index | None) -> Sparse | None:
    if order is None:
        return None
    return np.arange(order.size + 1), order, np.ones(order.size, np.float32)
