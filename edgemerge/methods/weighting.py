"""Cosine-weighted combination: from the Gram matrix of task vectors to one factor per model.

The hierarchical method (arXiv 2511.13373) weights each layer by the cosine similarity of the experts'
task vectors, w = max(0, cos). The public text of the paper does not say how w enters the average. All rules
here read the Gram matrix alone, `G[m, n] = <delta_m, delta_n>`. They give factors u, and the merged task
vector is `sum_m u_m delta_m`.

agreement
    u = s w / sum(w) over the active models, s = 1 / sqrt(w' C w), C = clip(cos, 0, 1). Equal task vectors
    are averaged. Orthogonal ones keep their energy (0.707 each for two). A tensor that only one expert
    changed takes that expert's change whole. This rule is ours, and the default.
paper
    u = (1 - w, w) for two experts: the literal reading, linear merging with alpha = max(0, cos). It is not
    symmetric. It returns expert A wherever the task vectors are orthogonal, as those of independent
    fine-tunes are, and loses what only B changed. It is kept for comparison.
stock
    u = t w / sum(w) over the N active models, t = N c / (1 + (N - 1) c), c the mean cosine of their pairs:
    Model Stock (Jang et al. 2024). A change that only one expert made is kept whole.
linear
    u = w / sum(w) over the active models.

One more rule reads no Gram matrix. `importance` has factors for each column of a matrix, by the models'
importance matrices: u_m = w_m F_m / sum(w F), where F_m is the mean square of what model m multiplies with
that column. It is Fisher merging (Matena and Raffel 2022) with squares of a layer's inputs in the place of
squared gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgemerge.types import Float32, Float64

__all__ = ["IMPORTANCE", "WEIGHTINGS", "column_factors", "factors", "plain_factors"]

IMPORTANCE = "importance"
WEIGHTINGS = ("agreement", "paper", "stock", "linear")  # by Gram matrices
INACTIVE = 1e-12  # of the largest norm; a model with a smaller norm did not change the tensor


def factors(grams: Float64, weights: Float64, weighting: str) -> Float64:
    """Factors of the models' task vectors.

    Parameters
    ----------
    grams : (..., n_models, n_models) float64
        Gram matrices, one per tensor or row.
    weights : (n_models,) float64
        The recipe's weights; from 0 on.
    weighting : str
        One of `WEIGHTINGS`.

    Returns
    -------
    (..., n_models) float64
        All zero where no model changed anything (but with `paper`, which then gives 1 and 0).
    """
    norms: Float64 = np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1))
    active = norms > INACTIVE * norms.max(axis=-1, keepdims=True)
    cosines = _cosines(grams, norms, active)
    if weighting == "paper":
        fraction = np.clip(cosines[..., 0, 1], 0.0, None)
        return np.asarray(np.stack([1.0 - fraction, fraction], axis=-1), np.float64)
    fractions: Float64 = np.where(active, weights, 0.0)
    total = _sum(fractions)[..., None]
    fractions = np.divide(fractions, total, out=np.zeros_like(fractions), where=total != 0)
    if weighting == "stock":
        return np.asarray(fractions * _stock_step(cosines, active)[..., None])
    if weighting == "agreement":
        agreed = np.clip(cosines, 0.0, 1.0)
        energy = _sum(fractions * _sum(agreed * fractions[..., None, :]))
        scale = np.divide(1.0, np.sqrt(energy), out=np.zeros_like(energy), where=energy > 0)
        return np.asarray(fractions * scale[..., None])
    return fractions


def plain_factors(weights: Float64) -> Float64:
    """Factors of models whose weights alone count, w / sum(w); (n_models,) as given."""
    return np.asarray(weights / _sum(weights))


def column_factors(importances: Sequence[Float32], weights: Float64, out_f32: Float32) -> None:
    """Factors of the models' task vectors for each column, by the importances of these columns.

    Parameters
    ----------
    importances : sequence of (n_cols,) float32
        Of each model; from 0 on.
    weights : (n_models,) float64
        The recipe's weights; from 0 on, and not all 0.
    out_f32 : (n_models, n_cols) float32
        Written. A column that matters to no model has the plain factors.
    """
    total: Float64 = np.zeros(out_f32.shape[1])
    for weight, values in zip(weights, importances, strict=True):
        total += weight * values
    for k, (weight, plain) in enumerate(zip(weights, plain_factors(weights), strict=True)):
        product = weight * importances[k].astype(np.float64)
        np.divide(product, total, out=product, where=total > 0)
        out_f32[k] = np.where(total > 0, product, plain)


def _cosines(grams: Float64, norms: Float64, active: NDArray[np.bool_]) -> Float64:
    """Cosines of all pairs; 0 beside an inactive model, 1 on the diagonal of an active one."""
    products = norms[..., :, None] * norms[..., None, :]
    both = active[..., :, None] & active[..., None, :] & (products > 0)
    cosines = np.divide(grams, products, out=np.zeros_like(grams), where=both)
    np.clip(cosines, -1.0, 1.0, out=cosines)
    return cosines


def _stock_step(cosines: Float64, active: NDArray[np.bool_]) -> Float64:
    """Model Stock's interpolation from the base to the mean of the active models.

    It is 1 for one model, whose change is kept whole, and 0 where its denominator vanishes.
    """
    n = np.count_nonzero(active, axis=-1)
    off_diagonal = _sum(_sum(cosines)) - _sum(np.diagonal(cosines, axis1=-2, axis2=-1))
    mean = off_diagonal / np.maximum(1, n * (n - 1))
    divisor = 1.0 + (n - 1) * mean
    step: Float64 = np.zeros_like(mean)
    np.divide(n * mean, divisor, out=step, where=np.abs(divisor) >= 1e-6)
    return np.where(n == 1, 1.0, step)


def _sum(x: Float64) -> Float64:
    """Sum over the last axis, front to back: NumPy's own order depends on how many rows there are."""
    total: Float64 = np.zeros(x.shape[:-1])
    for i in range(x.shape[-1]):
        total = total + x[..., i]
    return total
