"""SLERP: spherical interpolation between the base and one model (Shoemake 1985)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream
from edgemerge.methods.method import Described, Method, WorkingMemory
from edgemerge.methods.parameters import Parameter
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64

__all__ = ["SLERP"]

gram, linear = KernelFile("gram"), KernelFile("linear")

TINY_NORM = 1e-8
PARALLEL = 0.9995  # |cos| above which slerp is lerp, as in mergekit


def _interpolate(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    dots = stream.group.row_sum((3,))
    rows = stream.take((stream.job.rows_per_block, 3), np.float64).view(np.float64)
    lanes = stream.take((SUM_LANES,), np.float64)
    for block in stream.blocks():
        own = rows[: block.n_rows]
        gram.row_dots(block.base, block.experts[0], block.n_cols, lanes, own)
        dots.add(block.number, own)
    from_base, from_expert = _slerp_factors(dots.total(), float(stream.job.settings["t"]))
    for block in stream.blocks():
        assert block.base is not None
        linear.weighted_sum(np.array([from_expert], np.float32), block.experts)
        linear.weighted_sum(np.array([from_base], np.float32), block.base.reshape(1, -1))
        linear.add_scaled(block.experts[0], 1.0, block.base)
        yield block, block.base


def _slerp_factors(dots: Float64, t: float) -> tuple[float, float]:
    """Factors of base and expert: Shoemake's, on whole tensors, lerp where they are parallel."""
    norms = [math.sqrt(float(dots[i])) for i in (0, 2)]
    scale = 1.0
    for norm in norms:
        scale *= norm if norm > TINY_NORM else 1.0
    cosine = float(dots[1]) / scale
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _two_passes(tensor: Described) -> int:
    return 2


def _memory(tensor: Described) -> WorkingMemory:
    return WorkingMemory(per_row=3 * 8)  # the dot products of a row


SLERP = Method(
    "slerp",
    "spherical interpolation from the base (t = 0) to one model (t = 1)",
    "Shoemake 1985",
    parameters=(Parameter("t", "place between the base (0) and the model (1)", span=(0.0, 1.0)),),
    kernels=("gram.row_dots", "gram.add_rows", "linear.weighted_sum", "linear.add_scaled"),
    blocks=_interpolate,
    needs_base=True,
    n_models=(1, 1),
    passes=_two_passes,
    memory=_memory,
)
