"""The hierarchical method (arXiv 2511.13373): task vectors weighted by their cosine similarity.

The paper first aligns attention heads. That is done where experts are read
(`edgemerge.alignment.reordering`), so every method can use it. Here the Gram matrix of the aligned task
vectors is measured over a tensor, a transformer block or each row. `edgemerge.methods.weighting` turns it
into one factor per expert. Or there is a factor for each column, by the experts' importance matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgemerge.errors import RecipeError
from edgemerge.methods.blocks import Block, BlockStream, model_weights
from edgemerge.methods.calibration import (
    SVC,
    SVC_RANK,
    calibrate,
    calibrating_kernels,
    calibration_memory,
    calibration_passes,
    is_calibrated,
)
from edgemerge.methods.copies import Adder, Copies
from edgemerge.methods.grams import GRAM_KERNELS, GramRows, gram_memory, survey_gram
from edgemerge.methods.method import Described, Method, WorkingMemory, always, check_weights
from edgemerge.methods.parameters import LAMBDA, WEIGHT, Parameter
from edgemerge.methods.weighting import (
    IMPORTANCE,
    WEIGHTINGS,
    column_factors,
    factors,
    plain_factors,
)
from edgemerge.native import KernelFile
from edgemerge.types import Float32, TensorJob

__all__ = ["HIERARCHICAL"]

gram, linear = KernelFile("gram"), KernelFile("linear")
importance = KernelFile("importance")


def _weighted(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of `base + lambda * sum_m u_m delta_m`."""
    add, scale = _adder(stream), float(stream.job.settings["lambda"])
    if is_calibrated(stream.job):
        copies = Copies(stream)
        yield from calibrate(stream, lambda block: copies.merge(block, add), scale)
        return
    for block in stream.blocks():
        assert block.base is not None
        add(scale, block, block.experts, block.base)
        yield block, block.base


def _adder(stream: BlockStream) -> Adder:
    """Find the factors, and return what adds task vectors by them to rows."""
    job = stream.job
    weighting, weights = str(job.settings["weighting"]), model_weights(job)
    if _is_measured(job):
        return _add_by_columns(stream)
    if job.settings["scope"] == "row":
        return _add_by_rows(stream, weighting)
    if weighting == IMPORTANCE:
        shares = plain_factors(weights)
    else:
        measured = survey_gram(stream) if stream.layer_sum is None else stream.layer_sum
        shares = factors(measured, weights, weighting)
    scales = shares.astype(np.float32)
    return lambda scale, _, deltas, rows: linear.add_deltas(
        scales, np.ones_like(scales), scale, deltas, rows
    )


def _add_by_rows(stream: BlockStream, weighting: str) -> Adder:
    """Every row with factors of its own: one read, since a row is always whole."""
    weights, grams = model_weights(stream.job), GramRows(stream)

    def add(scale: float, block: Block, deltas: Float32, rows: Float32) -> None:
        scales = factors(grams.of(block), weights, weighting).astype(np.float32)
        gram.combine_rows(scales, block.n_cols, deltas)
        linear.add_scaled(deltas[0], scale, rows)

    return add


def _add_by_columns(stream: BlockStream) -> Adder:
    """Every column of every matrix with factors of its own, which are read before the blocks."""
    job = stream.job
    n_matrices, n_experts = _n_matrices(job), len(job.experts)
    shares = stream.take((n_matrices, n_experts, job.n_cols), np.float32).view(np.float32)
    of_expert = stream.take((n_matrices, job.n_cols), np.float32).view(np.float32)
    for k in range(n_experts):
        stream.read_importances(k, of_expert)
        shares[:, k] = of_expert
    for matrix in shares:
        column_factors(matrix.copy(), model_weights(job), matrix)
    n_rows = job.out.n_rows // n_matrices

    def add(scale: float, block: Block, deltas: Float32, rows: Float32) -> None:
        importance.add_changes(shares, block.first // block.n_cols, n_rows, scale, deltas, rows)

    return add


# -- the record ----------------------------------------------------------------------------------

SCOPES = ("tensor", "block", "row")


def _passes(tensor: Described) -> int:
    is_one = tensor.settings["scope"] == "row" or _reads_importances(tensor)
    return calibration_passes(tensor) + (1 if is_one else 2)


def _reads_importances(tensor: Described) -> bool:
    return tensor.settings["weighting"] == IMPORTANCE


def _is_measured(tensor: Described) -> bool:
    return all(expert.imatrix is not None for expert in tensor.experts)


def _n_matrices(job: TensorJob) -> int:
    """Return how many matrices are stacked: of a layer's experts, or one."""
    return math.prod(job.out.shape[:-2])


def _memory(job: TensorJob) -> WorkingMemory:
    own, calibration = _factor_memory(job), calibration_memory(job)
    return WorkingMemory(own.fixed + calibration.fixed, own.per_row + calibration.per_row)


def _factor_memory(job: TensorJob) -> WorkingMemory:
    if not _is_measured(job):
        return gram_memory(job)
    n_experts = len(job.experts)
    factors_bytes = 4 * job.n_cols * _n_matrices(job) * (n_experts + 1)
    return WorkingMemory(factors_bytes + job.n_cols * (4 * n_experts + 8 * 8))


def _check_importance(tensor: Described) -> None:
    if tensor.settings["scope"] != SCOPES[0]:
        raise RecipeError(
            "scope says what cosines are measured over, and weighting: importance measures none; "
            "leave scope out",
            field="scope",
        )


def _check(tensor: Described) -> None:
    least = min(float(expert.settings["weight"]) for expert in tensor.experts)
    if least < 0:  # divided by a negative sum, it would add what it is to take off
        raise RecipeError(
            f"hierarchical averages changes and takes none off, and {tensor.name} has the weight {least:g}; "
            "give weights from 0, or use task_arithmetic",
            field="weight",
        )
    if _reads_importances(tensor):
        _check_importance(tensor)
    if tensor.settings["weighting"] != "paper":
        check_weights(tensor, "change them")
    elif len(tensor.experts) != 2:
        raise RecipeError(
            f"the paper's weighting is defined for two models, not {len(tensor.experts)}; "
            "use weighting: agreement",
            field="weighting",
        )


def _spans_layer(tensor: Described) -> bool:
    return tensor.settings["scope"] == "block" and tensor.name.startswith("blk.")


HIERARCHICAL = Method(
    "hierarchical",
    "align attention heads by optimal transport, weight changes by their cosine similarity",
    "arXiv 2511.13373",
    parameters=(
        WEIGHT.by_default(1.0),
        Parameter(
            "weighting",
            "rule that gives each model its factor",
            "agreement",
            "word",
            (*WEIGHTINGS, IMPORTANCE),
        ),
        Parameter("scope", "what the cosines are measured over", "tensor", "word", SCOPES),
        LAMBDA,
        SVC,
        SVC_RANK,
    ),
    kernels=(
        "linear.subtract",
        "linear.add_deltas",
        "linear.add_scaled",
        "gram.combine_rows",
        "importance.add_changes",
        *GRAM_KERNELS,
    ),
    blocks=_weighted,
    needs_base=True,
    align="hard",
    passes=_passes,
    memory=_memory,
    check=_check,
    takes_deltas=always,
    reads_importances=_reads_importances,
    spans_layer=_spans_layer,
    more_kernels=calibrating_kernels,
    measure=survey_gram,
    presets={"paper": {"weighting": "paper"}},
)
