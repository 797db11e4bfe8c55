"""Which tensors of a merge an importance matrix guides, and what the output says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemerge.errors import MismatchError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.split import whole_name
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.types import TensorJob

__all__ = ["importance_metadata", "weigh_jobs"]

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
N_NAMED = 4


def weigh_jobs(
    jobs: Sequence[TensorJob], importance: ImportanceMatrix
) -> tuple[list[TensorJob], list[str]]:
    """Mark the tensors that are encoded by their importances, as llama-quantize does.

    What the matrix lacks is quantised without. `llama_model_quantize_impl` of llama.cpp's
    src/llama-quant.cpp also lets embeddings pass for which there is a wrong number of values.

    Returns
    -------
    jobs : list of TensorJob
        With `is_weighted` set.
    notes : list of str
        What is quantised without importances.

    Raises
    ------
    MismatchError
        The matrix was made of a model of another shape.
    """
    weighed = []
    lacking = []
    for job in jobs:
        name, shape = job.out.name, job.out.shape
        if job.is_byte_copy or not CODECS[job.out.dtype].is_weighted:
            weighed.append(job)
            continue
        n_values = job.out.n_cols * (shape[0] if len(shape) == 3 else 1)
        found = importance.sizes.get(name)
        if found not in (None, n_values) and name not in EMBEDDINGS:
            raise MismatchError(
                f"{importance.path} has {found} importances for {name!r}, which needs {n_values}; "
                "give the importance matrix of this model",
                tensor=name,
            )
        if found != n_values:
            lacking.append(name)
        weighed.append(replace(job, is_weighted=found == n_values))
    if not lacking:
        return weighed, []
    listed = ", ".join(lacking[:N_NAMED]) + (" and so on" if len(lacking) > N_NAMED else "")
    return weighed, [
        f"{importance.path.name} has no importances for {len(lacking)} "
        f"tensor{'s' * (len(lacking) > 1)}, quantised without: {listed}"
    ]


def importance_metadata(importance: ImportanceMatrix) -> dict[str, bytes]:
    """Say in the output what guided its encoders: llama-quantize's keys, and a checksum."""
    metadata = {
        "quantize.imatrix.file": encode_value(whole_name(importance.path), "str"),
        "quantize.imatrix.entries_count": encode_value(len(importance.sizes), "u32"),
    }
    if importance.dataset:
        metadata["quantize.imatrix.dataset"] = encode_value(importance.dataset, "str")
    if importance.n_chunks:
        metadata["quantize.imatrix.chunks_count"] = encode_value(importance.n_chunks, "u32")
    return metadata | {"edgemerge.imatrix_crc32": encode_value(importance.crc32, "u32")}
