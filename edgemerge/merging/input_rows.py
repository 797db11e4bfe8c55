"""Which inputs of a tensor are changes of the base's rows, so that the base is read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemerge.alignment.reordering import Reordering
from edgemerge.formats.adapters.adapted import AdaptedSource
from edgemerge.types import Source, TensorJob

__all__ = ["find_on_base"]


def find_on_base(
    job: TensorJob, sources: Sequence[Source], reorderings: Mapping[int, Reordering]
) -> dict[int, AdaptedSource]:
    """Find the inputs that are the base with adapters or deltas, whose rows follow from the base's.

    So the base is read once for all of them. Not where rows are permuted, or found by tokens: these may be
    other rows of the base.
    """
    base = job.base
    if base is None or job.rows is not None:
        return {}
    found: dict[int, AdaptedSource] = {}
    for i, tensor in enumerate(job.inputs):
        source = sources[tensor.model]
        if i in reorderings or tensor.spec.name != base.spec.name:
            continue
        if isinstance(source, AdaptedSource) and source.base is sources[base.model]:
            found[i] = source
    return found
