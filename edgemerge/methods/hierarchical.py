"""The hierarchical method (arXiv 2511.13373): task vectors weighted by their cosine similarity.

The paper first aligns attention heads. That is done where experts are read
(`edgemerge.alignment.reordering`), so every method can use it. Here the Gram matrix of the aligned task
vectors is measured over a tensor, a transformer block or each row. `edgemerge.methods.weighting` turns it
into one factor per expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemerge.errors import RecipeError
from edgemerge.methods.blocks import Block, BlockStream, model_weights
from edgemerge.methods.grams import GRAM_KERNELS, GramRows, gram_memory, survey_gram
from edgemerge.methods.method import Described, Method, always, check_weights
from edgemerge.methods.parameters import LAMBDA, WEIGHT, Parameter
from edgemerge.methods.weighting import WEIGHTINGS, factors
from edgemerge.native import KernelFile
from edgemerge.types import Float32

__all__ = ["HIERARCHICAL"]

gram, linear = KernelFile("gram"), KernelFile("linear")


def _weighted(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    """Yield the blocks of `base + lambda * sum_m u_m delta_m`."""
    job = stream.job
    weighting, scale = str(job.settings["weighting"]), float(job.settings["lambda"])
    weights = model_weights(job)
    if job.settings["scope"] == "row":
        yield from _row_blocks(stream, weighting, scale)
        return
    measured = survey_gram(stream) if stream.layer_sum is None else stream.layer_sum
    scales = factors(measured, weights, weighting).astype(np.float32)
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


# -- the record ----------------------------------------------------------------------------------

SCOPES = ("tensor", "block", "row")


def _passes(tensor: Described) -> int:
    return 1 if tensor.settings["scope"] == "row" else 2


def _check(tensor: Described) -> None:
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
            "weighting", "rule that turns cosines into factors", "agreement", "word", WEIGHTINGS
        ),
        Parameter("scope", "what the cosines are measured over", "tensor", "word", SCOPES),
        LAMBDA,
    ),
    kernels=(
        "linear.subtract",
        "linear.add_deltas",
        "linear.add_scaled",
        "gram.combine_rows",
        *GRAM_KERNELS,
    ),
    blocks=_weighted,
    needs_base=True,
    align="hard",
    passes=_passes,
    memory=gram_memory,
    check=_check,
    takes_deltas=always,
    spans_layer=_spans_layer,
    measure=survey_gram,
    presets={"paper": {"weighting": "paper"}},
)
