"""RAM and RAM+ (arXiv 2601.13572): mean over the models that changed an element, and over no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.blocks import Block, BlockStream
from edgemerge.methods.method import Described, Method, WorkingMemory, always
from edgemerge.methods.parameters import SAME_BELOW, Parameter
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Setting, TensorJob

__all__ = ["RAM", "RAMPLUS_TL"]

ram = KernelFile("ram")


def _mean(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    yield from _add(stream, np.ones(len(stream.job.experts), np.float32))


def _enlarged_mean(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    """Enlarge what only one model changed, more where most of its changes are shared."""
    settings, n_models = stream.job.settings, len(stream.job.experts)
    counts = stream.take((2 * n_models,), np.uint32).view(np.uint32)
    counts[:] = 0
    for block in stream.blocks():
        ram.count_changes(float(settings["epsilon"]), block.experts, counts)
    stream.group.add_counts(counts)
    yield from _add(stream, _factors(counts[:n_models], counts[n_models:], settings))


def _factors(
    shared: NDArray[np.uint32], alone: NDArray[np.uint32], settings: Mapping[str, Setting]
) -> Float32:
    """Return `1 + r clip(shared / max(alone, epsilon), 0, alpha)` for each model."""
    r, alpha, least = (float(settings[name]) for name in ("r", "alpha", "epsilon"))
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing alone, and epsilon 0
        ratios = shared.astype(np.float64) / np.maximum(alone.astype(np.float64), least)
    return (1.0 + r * np.minimum(np.maximum(ratios, 0.0), alpha)).astype(np.float32)


def _add(stream: BlockStream, alone: Float32) -> Iterator[tuple[Block, Float32]]:
    least = float(stream.job.settings["epsilon"])
    for block in stream.blocks():
        ram.add_changes(least, alone, block.experts, block.base)
        assert block.base is not None
        yield block, block.base


def _two_passes(tensor: Described) -> int:
    return 2


def _counters(job: TensorJob) -> WorkingMemory:
    return WorkingMemory(4 * 2 * len(job.experts))


RAM = Method(
    "ram",
    "mean over the models that changed an element",
    "arXiv 2601.13572",
    parameters=(SAME_BELOW,),
    kernels=("linear.subtract", "ram.add_changes"),
    blocks=_mean,
    needs_base=True,
    takes_deltas=always,
)

RAMPLUS_TL = Method(
    "ramplus_tl",
    "the same, and what only one model changed is enlarged",
    "arXiv 2601.13572",
    parameters=(
        Parameter(
            "r",
            "how much it is enlarged for each shared change to one of its own",
            0.1,
            span=(0.0, 1.0),
        ),
        Parameter("alpha", "most of these ratios that counts", 0.2, span=(0.0, 1.0)),
        SAME_BELOW,
    ),
    kernels=("linear.subtract", "ram.count_changes", "ram.add_changes"),
    blocks=_enlarged_mean,
    needs_base=True,
    passes=_two_passes,
    memory=_counters,
    takes_deltas=always,
)
