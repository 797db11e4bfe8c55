"""How the rows of a tensor's inputs are had: in which order, and which are changes of the base's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from edgemerge.alignment.neurons import NeuronPlan
from edgemerge.alignment.records import HeadPlan
from edgemerge.alignment.reordering import Reordering, find_neuron_reordering, find_reordering
from edgemerge.formats.adapters.adapted import AdaptedSource
from edgemerge.formats.architectures import layer_index
from edgemerge.types import Source, TensorJob

__all__ = ["Permutations", "find_on_base", "find_reorderings"]

# (reference, model, layer of the reference, layer of the model) -> how heads and neurons are permuted
Permutations: TypeAlias = dict[tuple[int, int, int, int], list[HeadPlan | NeuronPlan]]


def find_reorderings(
    job: TensorJob, permutations: Permutations, *, soft: bool
) -> dict[int, Reordering]:
    """Find the inputs whose rows or columns are permuted: input number -> reordering."""
    reorderings: dict[int, Reordering] = {}
    first = job.inputs[0]
    reference = layer_index(first.spec.name)
    for i, tensor in enumerate(job.inputs):
        layer = layer_index(tensor.spec.name)
        if reference is None or layer is None:
            continue
        for plan in permutations.get((first.model, tensor.model, reference, layer), ()):
            if isinstance(plan, HeadPlan):
                reordering = find_reordering(plan, tensor.spec.name, soft=soft)
            else:
                reordering = find_neuron_reordering(plan, tensor.spec.name, tensor.spec.n_rows)
            if reordering is not None:
                reorderings[i] = reordering
    return reorderings


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
