"""NearSwap: take over from a model what differs little from the base."""

from __future__ import annotations

from collections.abc import Iterator

from edgemerge.methods.blocks import Block, BlockStream
from edgemerge.methods.method import Method, always
from edgemerge.methods.parameters import Parameter
from edgemerge.native import KernelFile
from edgemerge.types import Float32

__all__ = ["NEARSWAP"]

nearswap = KernelFile("nearswap")


def _swap(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    threshold = float(stream.job.settings["t"])
    for block in stream.blocks():
        assert block.base is not None
        nearswap.swap_near(threshold, block.experts[0], block.base)
        yield block, block.base


NEARSWAP = Method(
    "nearswap",
    "take weights of one model where they are near the base's, less of those far off",
    "alchemonaut, mergekit",
    parameters=(
        Parameter(
            "t", "difference up to which the model's weight is taken whole", span=(0.0, 0.01)
        ),
    ),
    kernels=("nearswap.swap_near",),
    blocks=_swap,
    needs_base=True,
    n_models=(1, 1),
    keeps_non_finite=always,
)
