"""Linear and passthrough: weighted averages of whole models, and copies of one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemerge.methods.blocks import Block, BlockStream, model_weights
from edgemerge.methods.method import Described, Method, always, check_weights
from edgemerge.methods.parameters import NORMALIZE, SCALE, WEIGHT
from edgemerge.native import KernelFile
from edgemerge.types import Float32

__all__ = ["LINEAR", "PASSTHROUGH"]

linear = KernelFile("linear")


def _average(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    weights = model_weights(stream.job)
    if stream.job.settings["normalize"]:
        weights = weights / float(weights.sum())  # `_check_sum` refuses a sum of zero
    for block in stream.blocks():
        linear.weighted_sum(weights.astype(np.float32), block.experts)
        yield block, block.experts[0]


def _check_sum(tensor: Described) -> None:
    if tensor.settings["normalize"]:
        check_weights(tensor, "change them or set normalize: false")


def _is_whole_model(tensor: Described) -> bool:
    """Tell whether there is one model, with a weight of 1, or divided by itself."""
    is_one = bool(tensor.settings["normalize"]) or tensor.experts[0].settings["weight"] == 1.0
    return len(tensor.experts) == 1 and is_one


LINEAR = Method(
    "linear",
    "weighted average of the models",
    "Wortsman et al. 2022",
    parameters=(WEIGHT, NORMALIZE.by_default(True)),
    kernels=("linear.weighted_sum",),
    blocks=_average,
    check=_check_sum,
    keeps_non_finite=always,
    copies=_is_whole_model,
    presets={"paper": {}},
)


def _scaled(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    scale = np.array([stream.job.experts[0].settings["scale"]], np.float32)
    for block in stream.blocks():
        linear.weighted_sum(scale, block.experts)
        yield block, block.experts[0]


def _is_unscaled(tensor: Described) -> bool:
    return tensor.experts[0].settings["scale"] == 1.0


PASSTHROUGH = Method(
    "passthrough",
    "copy the layers of one model per slice, byte for byte where nothing is scaled",
    "mergekit",
    parameters=(SCALE,),
    kernels=("linear.weighted_sum",),
    blocks=_scaled,
    n_models=(1, 1),
    keeps_non_finite=always,
    copies=_is_unscaled,
)
