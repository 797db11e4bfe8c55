"""Least squares under covariances that task vectors show (arXiv 2503.08099, 2603.02945, 2604.01329).

A merged change D should do to each expert's inputs what the expert's own change D_i does. With inputs of
covariance C_i, the sum of `tr((D - D_i) C_i (D - D_i)')` is least at

    D = (sum_i w_i D_i C_i) (sum_i w_i C_i)^-1,    C_i = D_i' D_i / tr(D_i' D_i) + ridge / n I

with n columns. The rows of D_i stand for the inputs, as gradient steps add multiples of inputs to them. So
no data is needed. WUDI (2503.08099) descends to a like point; ACE (2603.02945) has it in closed form.

Written as `D = D_1 + sum_(i > 1) (D_i - D_1) F_i`, `F_i = w_i C_i (sum_j w_j C_j)^-1`, it takes two passes:
one for the products of columns, one to combine rows. Both cost columns times columns for each row. So only
`columns` neighbours at a time are taken together; the products of others count as zero. With `columns: 0`
all are taken together, and the result is the formula's.

A model that did not change a tensor has no part in it. A stack of experts is one tall matrix. Tensors of one
row have no covariance, and the inputs of embeddings are tokens. There the changes are averaged by weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from edgemerge.errors import RecipeError
from edgemerge.methods.blocks import Block, BlockStream, model_weights
from edgemerge.methods.method import Described, Method, WorkingMemory, always
from edgemerge.methods.parameters import LAMBDA, WEIGHT, Parameter
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["COVARIANCE"]

covariance, linear = KernelFile("covariance"), KernelFile("linear")

# Of kernels/covariance.py.
TILE, ROWS, CHUNK = 256, 32, 64
SUMS = 4 * (TILE + ROWS)

COLUMNS = 256.0  # twice as many cost twice the time


def _least_squares(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    job = stream.job
    weights, scale = model_weights(job), float(job.settings["lambda"])
    fractions = (weights / float(weights.sum())).astype(np.float32)
    found = _Factors(stream, weights) if _is_solved(job) else None
    for block in stream.blocks():
        assert block.base is not None
        if found is not None and found.exist:
            found.combine(block)
        else:
            linear.weighted_sum(fractions, block.experts)
        linear.add_scaled(block.experts[0], scale, block.base)
        yield block, block.base


class _Factors:
    """The matrices F_i of a tensor, found in one pass."""

    def __init__(self, stream: BlockStream, weights: Float64) -> None:
        job = stream.job
        self._width = _width(job)
        self._sums = stream.take((SUMS,), np.float32).view(np.float32)
        self._packed = stream.take((ROWS, TILE), np.float32).view(np.float32)
        shape = (len(job.experts), job.n_cols, self._width)
        self._matrices = stream.take(shape, np.float32).view(np.float32)
        self._survey(stream)
        self.exist = self._solve(stream, weights)

    def combine(self, block: Block) -> None:
        """Write the merged change of some rows over the first model's."""
        rows = block.experts.reshape(len(block.experts), block.n_rows, block.n_cols)
        covariance.combine(self._matrices, self._sums, rows)

    def _survey(self, stream: BlockStream) -> None:
        """Add up the products of columns of every model's task vector."""
        total = stream.group.large_sum(self._matrices)
        for block in stream.blocks():
            total.add_by(block.number, partial(self._add, block))
        total.copy_to(self._matrices)

    def _add(self, block: Block, grams: Float32) -> None:
        for delta, own in zip(block.experts, grams, strict=True):
            rows = delta.reshape(block.n_rows, block.n_cols)
            covariance.add_grams(rows, self._width, self._sums, self._packed, own)

    def _solve(self, stream: BlockStream, weights: Float64) -> bool:
        """Turn products into factors. Return False where no model with a weight changed the tensor."""
        n_cols, ridge = stream.job.n_cols, float(stream.job.settings["ridge"])
        columns = np.arange(n_cols)
        traces = [math.fsum(own[columns, columns % self._width]) for own in self._matrices]
        counts = [bool(trace and weight) for trace, weight in zip(traces, weights, strict=True)]
        if not any(counts):
            return False
        parts = np.where(counts, weights, 0.0)
        scales = parts / np.where(counts, traces, 1.0)
        work = stream.take((self._width, self._width), np.float64).view(np.float64)
        sides = stream.take((self._width, CHUNK), np.float64).view(np.float64)
        covariance.solve_factors(
            scales, parts * ridge / n_cols, self._width, work, sides, self._matrices
        )
        return True


def _width(tensor: Described) -> int:
    """Return how many columns are taken together."""
    columns = int(float(tensor.settings["columns"]))
    return min(columns or tensor.n_cols, tensor.n_cols)


def _is_solved(tensor: Described) -> bool:
    """Tell whether there are several models, and a matrix whose columns are multiplied with inputs."""
    is_matrix = tensor.experts[0].spec.n_rows > 1
    looks_up = tensor.name.split(".")[0].endswith("_embd")
    return len(tensor.experts) > 1 and is_matrix and not looks_up


def _passes(tensor: Described) -> int:
    return 2 if _is_solved(tensor) else 1


def _memory(job: TensorJob) -> WorkingMemory:
    if not _is_solved(job):
        return WorkingMemory()
    width = _width(job)
    matrices = 4 * len(job.experts) * job.n_cols * width
    return WorkingMemory(matrices + 4 * (SUMS + ROWS * TILE) + 8 * width * (width + CHUNK))


def _products(job: TensorJob) -> float:
    """Count the products of `add_grams` and `combine`, and those of `solve_factors`, which are of float64."""
    if not _is_solved(job):
        return 0.0
    n_experts, width = len(job.experts), _width(job)
    of_rows = job.out.n_elements * width * (n_experts / 2 + n_experts - 1)
    of_factors = job.n_cols * width**2 * (n_experts - 1 + 1 / 6)
    return of_rows + 3 * of_factors


def _check(tensor: Described) -> None:
    weights = [float(expert.settings["weight"]) for expert in tensor.experts]
    if min(weights) < 0 or not any(weights):
        raise RecipeError(
            f"covariance takes weights from 0, not all of them 0, and {tensor.name} has "
            f"{', '.join(f'{weight:g}' for weight in weights)}; change them",
            field="weight",
        )
    if not float(tensor.settings["ridge"]) > 0:
        raise RecipeError(
            "ridge must be above 0, as the covariance of few rows has no inverse", field="ridge"
        )


COVARIANCE = Method(
    "covariance",
    "the change that is nearest to all models' changes, under covariances that these show",
    "arXiv 2503.08099, 2603.02945 and 2604.01329",
    parameters=(
        WEIGHT.by_default(1.0),
        Parameter(
            "ridge",
            "what is added to a covariance, in parts of its mean variance",
            0.1,
            span=(0.0, 1.0),
        ),
        Parameter(
            "columns",
            "columns whose covariance is taken together; 0 for all, which takes much longer",
            COLUMNS,
            "count",
        ),
        LAMBDA,
    ),
    kernels=(
        "linear.subtract",
        "linear.weighted_sum",
        "linear.add_scaled",
        "covariance.add_grams",
        "covariance.solve_factors",
        "covariance.combine",
    ),
    blocks=_least_squares,
    needs_base=True,
    passes=_passes,
    memory=_memory,
    multiplies=_products,
    check=_check,
    takes_deltas=always,
)
