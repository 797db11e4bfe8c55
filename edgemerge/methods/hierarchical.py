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
    job = stream.job
    weighting, scale = str(job.settings["weighting"]), float(job.settings["lambda"])
    weights = model_weights(job)
    if _is_measured(job):
        yield from _important_blocks(stream, scale)
        return
    if job.settings["scope"] == "row":
        yield from _row_blocks(stream, weighting, scale)
        return
    if weighting == IMPORTANCE:
        shares = plain_factors(weights)
    else:
        measured = survey_gram(stream) if stream.layer_sum is None else stream.layer_sum
        shares = factors(measured, weights, weighting)
    scales = shares.astype(np.float32)
    for block in stream.blocks():
        assert block.base is not None
        linear.add_deltas(scales, np.ones_like(scales), scale, block.experts, block.base)
        yield block, block.base


def _row_blocks(
    stream: BlockStream, weighting: str, scale: float
) -> Iterator[tuple[Block, Float32]]:
    """Every row with factors of its own: one read, since a row is always whole."""
    weights = model_weights(stream.job)
    rows = GramRows(stream)
    for block in stream.blocks():
        scales = factors(rows.of(block), weights, weighting).astype(np.float32)
        assert block.base is not None
        gram.combine_rows(scales, block.n_cols, block.experts)
        linear.add_scaled(block.experts[0], scale, block.base)
        yield block, block.base


def _important_blocks(stream: BlockStream, scale: float) -> Iterator[tuple[Block, Float32]]:
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
    for block in stream.blocks():
        first = block.first // block.n_cols
        assert block.base is not None
        importance.add_changes(shares, first, n_rows, scale, block.experts, block.base)
        yield block, block.base


# -- the record ----------------------------------------------------------------------------------

SCOPES = ("tensor", "block", "row")


def _passes(tensor: Described) -> int:
    is_one = tensor.settings["scope"] == "row" or _reads_importances(tensor)
    return 1 if is_one else 2


def _reads_importances(tensor: Described) -> bool:
    return tensor.settings["weighting"] == IMPORTANCE


def _is_measured(tensor: Described) -> bool:
    return all(expert.imatrix is not None for expert in tensor.experts)


def _n_matrices(job: TensorJob) -> int:
    """Return how many matrices are stacked: of a layer's experts, or one."""
    return math.prod(job.out.shape[:-2])


def _memory(job: TensorJob) -> WorkingMemory:
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
    for expert in tensor.experts:
        if float(expert.settings["weight"]) < 0:
            raise RecipeError(
                f"the weight {expert.settings['weight']} cannot be multiplied with importances; give "
                "weights from 0 on",
                field="weight",
            )


def _check(tensor: Described) -> None:
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
    measure=survey_gram,
    presets={"paper": {"weighting": "paper"}},
)
