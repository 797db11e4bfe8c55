"""Which tensors of a merge importance matrices guide, and what the output says of them.

One matrix may guide the encoders of the output. Others may weight the models, each by what it multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from math import prod
from pathlib import Path

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.finding.cache import folder_name
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.split import whole_name
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.methods.method import Method
from edgemerge.planning.jobs import Draft
from edgemerge.types import InputTensor, Recipe, TensorJob

__all__ = ["find_measured", "importance_metadata", "list_matrices", "weigh_jobs"]

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
N_NAMED = 4


def list_matrices(jobs: Iterable[TensorJob], recipe: Recipe) -> list[Path]:
    """List the importance matrices that a merge reads, each once."""
    used = (tensor.imatrix for job in jobs for tensor in job.experts)
    return [path for path in dict.fromkeys((*used, recipe.imatrix)) if path is not None]


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
            raise _other_shape(importance, name, n_values)
        if found != n_values:
            lacking.append(name)
        weighed.append(replace(job, is_weighted=found == n_values))
    if not lacking:
        return weighed, []
    return weighed, [
        f"{importance.path.name} has no importances for {_list_tensors(lacking, 'quantised without')}"
    ]


def _list_tensors(names: Sequence[str], fate: str) -> str:
    listed = ", ".join(names[:N_NAMED]) + (" and so on" if len(names) > N_NAMED else "")
    return f"{len(names)} tensor{'s' * (len(names) > 1)}, {fate}: {listed}"


def _other_shape(importance: ImportanceMatrix, name: str, n_values: int) -> MismatchError:
    return MismatchError(
        f"{importance.path} has {importance.sizes[name]} importances for {name!r}, which needs "
        f"{n_values}; give the importance matrix of this model",
        tensor=name,
    )


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


# -- of the models -----------------------------------------------------------------------------------


def find_measured(
    drafts: Sequence[Draft], recipe: Recipe, method: Method, models: Sequence[Path]
) -> tuple[list[Draft], list[str], dict[str, bytes]]:
    """Find the tensors that are weighted by importances: those that every model's matrix has.

    Parameters
    ----------
    drafts : sequence of Draft
        The output's tensors; `InputTensor.imatrix` is what the recipe gives the model.
    recipe : Recipe
        What is wanted.
    method : Method
        The recipe's.
    models : sequence of Path
        As `Plan.models` lists them.

    Returns
    -------
    drafts : list of Draft
        Without `imatrix` where plain weights count.
    notes : list of str
        What is weighted without importances, or which matrices are not used.
    metadata : dict
        Says in the output which matrices were read: their checksums.

    Raises
    ------
    RecipeError
        A model has no matrix, and the method needs it.
    FormatError
        A matrix is damaged.
    MismatchError
        A matrix was made of a model of another shape.
    """
    weighted = [d for d in drafts if not d.is_constant and method.reads_importances(d)]
    if not weighted:
        notes = [
            f"{method.name} does not use the importance matrix of {folder_name(model.path)} here"
            for part in recipe.slices
            for model in part.inputs
            if model.imatrix is not None
        ]
        return [_without_matrices(draft) for draft in drafts], notes, {}
    with ExitStack() as stack:
        matrices = {
            path: stack.enter_context(closing(ImportanceMatrix(path)))
            for path in _matrices_of(weighted, models)
        }
        measured = {
            draft.name
            for draft in weighted
            if all([_has(matrices, tensor) for tensor in draft.experts])
        }
        checksums = [matrix.crc32 for matrix in matrices.values()]
    lacking = [draft for draft in weighted if draft.name not in measured]
    found = [draft if draft.name in measured else _without_matrices(draft) for draft in drafts]
    metadata = {"edgemerge.model_imatrix_crc32": encode_value(checksums, "[u32]")}
    return found, _note_lacking(lacking), metadata


def _without_matrices(draft: Draft) -> Draft:
    return replace(draft, experts=tuple(replace(one, imatrix=None) for one in draft.experts))


def _matrices_of(drafts: Iterable[Draft], models: Sequence[Path]) -> list[Path]:
    """List the matrices of all models, and refuse a model without one."""
    found: dict[Path, None] = {}
    for tensor in (tensor for draft in drafts for tensor in draft.experts):
        if tensor.imatrix is None:
            raise RecipeError(
                "weighting: importance needs the importance matrix of each model, and "
                f"{folder_name(models[tensor.model])} has none: make it with edgemerge imatrix, and "
                "give imatrix: FILE beside model: in a recipe",
                field="imatrix",
            )
        found[tensor.imatrix] = None
    return list(found)


def _has(matrices: Mapping[Path, ImportanceMatrix], tensor: InputTensor) -> bool:
    """Tell whether a model's matrix has importances of a tensor, as many as it needs."""
    assert tensor.imatrix is not None
    matrix, spec = matrices[tensor.imatrix], tensor.spec
    n_values = spec.n_cols * prod(spec.shape[:-2])
    if matrix.sizes.get(spec.name) not in (None, n_values):
        raise _other_shape(matrix, spec.name, n_values)
    return spec.name in matrix.sizes


def _note_lacking(drafts: Sequence[Draft]) -> list[str]:
    """Say what is merged by plain weights, as a matrix lacks it: vectors by their number."""
    matrices = [draft.name for draft in drafts if len(draft.reference.shape) > 1]
    notes = []
    if n_vectors := len(drafts) - len(matrices):
        notes.append(
            f"no importances for {n_vectors} vector{'s' * (n_vectors > 1)}, such as norms, merged by "
            "plain weights"
        )
    if matrices:
        notes.append(f"no importances for {_list_tensors(matrices, 'merged by plain weights')}")
    return notes
