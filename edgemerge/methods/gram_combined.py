"""Model Stock, NuSLERP, multi-SLERP and the Karcher mean: linear combinations by factors from Gram matrices.

One pass measures the Gram matrix, `edgemerge.methods.coefficients` turns it into a factor per model, and a
second pass adds the models up. With factors of its own for each row one pass is enough, as rows are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.methods.blocks import Block, BlockStream, model_weights
from edgemerge.methods.coefficients import (
    karcher_factors,
    multislerp_factors,
    nuslerp_factors,
    stock_factors,
)
from edgemerge.methods.grams import GRAM_KERNELS, GramRows, gram_memory, survey_gram
from edgemerge.methods.method import Described, Method, WorkingMemory, always, check_weights
from edgemerge.methods.parameters import WEIGHT, Parameter
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["GRAM_COMBINED"]

gram, linear = KernelFile("gram"), KernelFile("linear")

TINY_WEIGHT = 1e-6  # sum of NuSLERP's weights below which they count as equal
COLUMN_SUMS = 3  # of two models: both squares and the product

COMBINING = (*GRAM_KERNELS, "linear.subtract", "linear.weighted_sum", "linear.add_deltas")


def _combine(stream: BlockStream, factors: Float64) -> Iterator[tuple[Block, Float32]]:
    """Yield the sum of models, or of task vectors and the base, with one factor for each model."""
    scales = factors.astype(np.float32)
    for block in stream.blocks():
        if block.base is None:
            linear.weighted_sum(scales, block.experts)
            yield block, block.experts[0]
        else:
            linear.add_deltas(scales, np.ones_like(scales), 1.0, block.experts, block.base)
            yield block, block.base


def _combine_rows(
    stream: BlockStream, factors_of: Callable[[Float64], Float64]
) -> Iterator[tuple[Block, Float32]]:
    """Do the same with factors of each row, (n_rows, n_models), from the Gram matrices of the rows."""
    rows = GramRows(stream)
    for block in stream.blocks():
        gram.combine_rows(
            factors_of(rows.of(block)).astype(np.float32), block.n_cols, block.experts
        )
        yield block, _onto_base(block)


def _onto_base(block: Block) -> Float32:
    """Return the sum in `block.experts[0]`, added to the base where there is one."""
    if block.base is None:
        return np.asarray(block.experts[0])
    linear.add_scaled(block.experts[0], 1.0, block.base)
    return block.base


def _has_base(tensor: Described) -> bool:
    return tensor.base is not None


def _two_passes(tensor: Described) -> int:
    return 2


# -- Model Stock -----------------------------------------------------------------------------------


def _stock(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    n_models = len(stream.job.experts)

    def factors_of(grams: Float64) -> Float64:
        return np.repeat(stock_factors(grams)[..., None], n_models, axis=-1)

    if stream.job.settings["filter_wise"]:
        yield from _combine_rows(stream, factors_of)
    else:
        yield from _combine(stream, factors_of(survey_gram(stream)))


def _stock_passes(tensor: Described) -> int:
    return 1 if tensor.settings["filter_wise"] else 2


MODEL_STOCK = Method(
    "model_stock",
    "from the base towards the models' mean, as far as their changes agree",
    "Jang et al. 2024",
    parameters=(Parameter("filter_wise", "a step of its own for each row", False, "switch"),),
    kernels=(*COMBINING, "linear.add_scaled", "gram.combine_rows"),
    blocks=_stock,
    needs_base=True,
    n_models=(2, None),
    passes=_stock_passes,
    memory=gram_memory,
    takes_deltas=always,
)


# -- NuSLERP ---------------------------------------------------------------------------------------


def _nuslerp(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    job = stream.job
    weights = model_weights(job)
    total = float(weights.sum())
    t = 0.5 if abs(total) < TINY_WEIGHT else float(weights[1]) / total
    if job.settings["nuslerp_flatten"]:
        (left, product), (_, right) = survey_gram(stream).tolist()
        yield from _combine(stream, np.array(nuslerp_factors(left, product, right, t)))
    elif _by_columns(job):
        yield from _nuslerp_columns(stream, t)
    else:
        yield from _combine_rows(
            stream, lambda g: _each(np.stack([g[:, 0, 0], g[:, 0, 1], g[:, 1, 1]], axis=-1), t)
        )


def _nuslerp_columns(stream: BlockStream, t: float) -> Iterator[tuple[Block, Float32]]:
    n_cols = stream.job.out.n_cols
    sums = stream.group.row_sum((COLUMN_SUMS, n_cols))

    def add(block: Block) -> Callable[[Float64], None]:
        return lambda total: gram.add_column_dots(block.experts[0], block.experts[1], total)

    for block in stream.blocks():
        sums.add_by(block.number, add(block))
    factors = _each(sums.total().T, t).T.astype(np.float32)
    for block in stream.blocks():
        gram.combine_columns(np.ascontiguousarray(factors), block.experts)
        yield block, _onto_base(block)


def _each(dots: Float64, t: float) -> Float64:
    """Return NuSLERP's factors for each pair of vectors; (n, 3) dot products -> (n, 2)."""
    return np.array([nuslerp_factors(a, b, c, t) for a, b, c in dots.tolist()]).reshape(-1, 2)


def _by_columns(tensor: Described) -> bool:
    """Tell whether each column is a vector; a tensor of one row has none (its first axis is its last)."""
    is_matrix = len(tensor.experts[0].spec.shape) > 1
    settings = tensor.settings
    return not settings["nuslerp_flatten"] and bool(settings["nuslerp_row_wise"]) and is_matrix


def _nuslerp_passes(tensor: Described) -> int:
    return 2 if tensor.settings["nuslerp_flatten"] or _by_columns(tensor) else 1


def _nuslerp_memory(job: TensorJob) -> WorkingMemory:
    if _by_columns(job):  # sums, their copy, and factors in both precisions
        return WorkingMemory(job.n_cols * (2 * COLUMN_SUMS * 8 + 4 * 8))
    return gram_memory(job)


NUSLERP = Method(
    "nuslerp",
    "spherical interpolation between two models, or between their changes of a base",
    "mergekit",
    parameters=(
        WEIGHT,
        Parameter(
            "nuslerp_flatten", "one angle for the tensor, not one for each vector", True, "switch"
        ),
        Parameter(
            "nuslerp_row_wise",
            "without `nuslerp_flatten`: vectors are columns (along the first axis), not rows; "
            "mergekit has these names the other way round",
            False,
            "switch",
        ),
    ),
    kernels=(
        *COMBINING,
        "linear.add_scaled",
        "gram.combine_rows",
        "gram.add_column_dots",
        "gram.combine_columns",
    ),
    blocks=_nuslerp,
    takes_base=True,
    n_models=(2, 2),
    passes=_nuslerp_passes,
    memory=_nuslerp_memory,
    takes_deltas=_has_base,
)


# -- Multi-SLERP -----------------------------------------------------------------------------------


def _multislerp(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    job = stream.job
    if len(job.experts) == 1:
        for block in stream.blocks():
            yield block, block.experts[0]
        return
    weights = model_weights(job)
    if job.settings["normalize_weights"]:
        weights = weights / float(weights.sum())
    try:
        factors = multislerp_factors(survey_gram(stream), weights, float(job.settings["eps"]))
    except MismatchError as error:
        raise MismatchError(f"{error}", tensor=job.out.name) from None
    yield from _combine(stream, factors)


def _check_multislerp(tensor: Described) -> None:
    if tensor.settings["normalize_weights"] and len(tensor.experts) > 1:
        check_weights(tensor, "change them or set normalize_weights: false")
    _check_norm(tensor, "eps")


def _check_norm(tensor: Described, name: str) -> None:
    if float(tensor.settings[name]) < 0:
        raise RecipeError(f"{name} must not be below 0, as it is a norm", field=name)


def _several_passes(tensor: Described) -> int:
    return 1 if len(tensor.experts) == 1 else 2


def _is_alone(tensor: Described) -> bool:
    return len(tensor.experts) == 1 and tensor.base is None


def _has_base_and_several(tensor: Described) -> bool:
    return len(tensor.experts) > 1 and tensor.base is not None


MULTISLERP = Method(
    "multislerp",
    "mean direction at the mean length, of models or of their changes of a base",
    "Goddard, mergekit",
    parameters=(
        WEIGHT,
        Parameter("normalize_weights", "divide the weights by their sum", True, "switch"),
        Parameter("eps", "added to norms before a division", 1e-8),
    ),
    kernels=COMBINING,
    blocks=_multislerp,
    takes_base=True,
    passes=_several_passes,
    memory=gram_memory,
    check=_check_multislerp,
    takes_deltas=_has_base_and_several,
    copies=_is_alone,
)


# -- Karcher mean ----------------------------------------------------------------------------------


def _karcher(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    settings = stream.job.settings
    max_iter, tol = int(float(settings["max_iter"])), float(settings["tol"])
    yield from _combine(stream, karcher_factors(survey_gram(stream), max_iter, tol))


def _check_karcher(tensor: Described) -> None:
    _check_norm(tensor, "tol")


KARCHER = Method(
    "karcher",
    "Karcher mean of the models' directions at their mean length; a base is one more model",
    "arXiv 2603.04972",
    parameters=(
        Parameter("max_iter", "steps at most", 10.0, "count"),
        Parameter("tol", "norm that counts as zero, and length of the last step", 1e-5),
    ),
    kernels=(*GRAM_KERNELS, "linear.weighted_sum"),
    blocks=_karcher,
    merges_base=True,
    passes=_two_passes,
    memory=gram_memory,
    check=_check_karcher,
    copies=_is_alone,
)

GRAM_COMBINED = (MODEL_STOCK, NUSLERP, MULTISLERP, KARCHER)
