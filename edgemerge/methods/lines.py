"""LiNeS (arXiv 2410.17146): task arithmetic whose factor grows with depth.

Layer l of L has the factor `alpha + beta (l - 1) / (L - 1)`: early layers keep the base's features, late ones
take over the experts'. The paper says nothing of tensors outside the layers. Here the embedding counts as
the first layer, and what comes after the layers, final norm and head, as the last. The authors' code gives
alpha to all of them.

The paper fixes alpha at 1 / number of models and tries beta on validation data. The defaults are that for two
models, and an end at 1, where the paper's edit of a single fine-tune ends.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemerge.methods.addition import ADDING, add_whole
from edgemerge.methods.blocks import Block, BlockStream, model_weights
from edgemerge.methods.method import Method, always
from edgemerge.methods.parameters import RAMP, WEIGHT, Parameter
from edgemerge.types import Float32

__all__ = ["LINES"]


def _scaled_by_depth(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    settings = stream.job.settings
    scale = float(settings["alpha"]) + float(settings["beta"]) * stream.job.depth
    yield from add_whole(stream, model_weights(stream.job).astype(np.float32), scale)


LINES = Method(
    "lines",
    "base plus weighted task vectors, by a factor that grows with depth",
    "Wang et al. 2024, arXiv 2410.17146",
    parameters=(
        WEIGHT.by_default(1.0),
        Parameter("alpha", "factor of the merged change in the first layer", 0.5, span=(0.0, 2.0)),
        Parameter("beta", "how much larger it is in the last layer", 0.5, span=(0.0, 2.0)),
    ),
    kernels=(ADDING,),
    blocks=_scaled_by_depth,
    needs_base=True,
    keeps_non_finite=always,
    presets={"ramp": {"alpha": RAMP[0], "beta": RAMP[1] - RAMP[0]}},
)
