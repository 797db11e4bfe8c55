"""What the user asks for: a mergekit YAML file, or flags, as a checked `Recipe`.

The schema is that of mergekit 0.1.5; our additions stand under the one key `edgemerge`. What mergekit ignores
is noted, or refused where a strict reader is asked for. How parameters are looked up for one tensor is in
`edgemerge.recipe.parameters`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemerge.errors import RecipeError
from edgemerge.finding.finder import Finder
from edgemerge.recipe.mergekit import RecipeReader
from edgemerge.recipe.mixture import MixtureReader, is_mixture
from edgemerge.recipe.searches import has_search
from edgemerge.recipe.stages import read_stages
from edgemerge.recipe.values import (
    MAX_SEED,
    ValueReader,
    check_alignment,
    check_format,
    note_duplicates,
)
from edgemerge.types import ModelInput, Recipe, Rule, Slice

__all__ = ["MAX_SEED", "check_alignment", "check_format", "find_imatrix", "load_recipe"]
__all__ += ["make_recipe"]


def load_recipe(
    path: str | os.PathLike[str], *, strict: bool = False, finder: Finder | None = None
) -> Recipe:
    """Read a mergekit recipe from a YAML file.

    Model paths are taken from the working directory, else from the recipe's folder. What is no path there
    may be the name of a model on the hub.

    Parameters
    ----------
    path : path
        The file. Several documents in it are stages; see `edgemerge.recipe.stages`.
    strict : bool
        Refuse unknown and duplicate keys and unknown parameters. Otherwise each is a note.
    finder : Finder, optional
        Finds models that are no paths; by default in the hub's cache, and fetches nothing.

    Raises
    ------
    RecipeError
        The file cannot be read, is no YAML, or asks for something that does not exist.
    """
    from edgemerge.formats.yaml_file import read_documents  # a recipe of flags needs no YAML

    path = Path(path)
    documents, duplicates = read_documents(path)
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise RecipeError(
            "is not a recipe: it needs keys such as merge_method and models", path=path
        )
    notes = note_duplicates(duplicates, path, strict=strict)
    if any(map(has_search, documents)):
        raise RecipeError(
            "has values that are to be found; give it to edgemerge search, and merge the recipe that this "
            "writes",
            path=path,
        )
    if any(is_mixture(document) for document in documents):
        if len(documents) > 1:
            raise RecipeError(
                "has a mixture of experts beside other documents; make the mixture by itself, from a "
                "recipe of its own",
                path=path,
            )
        recipe = MixtureReader(path, strict=strict, finder=finder).mixture(documents[0])
    elif len(documents) == 1:
        recipe = RecipeReader(path, strict=strict, finder=finder).recipe(documents[0])
    else:
        recipe = read_stages(documents, path, strict=strict, finder=finder)
    return replace(recipe, notes=(*notes, *recipe.notes))


def make_recipe(
    method: str,
    models: Sequence[tuple[str, float | None]],
    *,
    base: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_type: str | None = None,
    memory: int | None = None,
    seed: int = 0,
    align: str | None = None,
    neurons: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    imatrix: str | None = None,
    finder: Finder | None = None,
    out_format: str = "gguf",
) -> Recipe:
    """Build a recipe from flags.

    Parameters
    ----------
    method : str
        A key of `edgemerge.methods.table.METHODS`.
    models : sequence of (path, weight)
        The models to merge; a weight of None is 1.0.
    base : str, optional
        The common base, for the methods that need one.
    parameters : mapping, optional
        mergekit's parameter names -> number, bool, text, or list of numbers (a gradient).
    out_type : str, optional
        File type of the output, or `keep`.
    memory : int, optional
        Budget in bytes.
    seed : int
        Of the random methods and of the alignment's sketches.
    align : str, optional
        hard, soft, full or off: whether attention heads are brought into the base's order (without a
        base, the first model's), and with full also values and neurons; by default what the method does.
    neurons : bool
        Match feed-forward neurons too; for models trained apart.
    tensor_types : sequence of (pattern, type)
        ggml types for the tensors whose GGUF name a regular expression finds, first match first;
        see `edgemerge.formats.quants.overrides`.
    imatrix : str, optional
        Path of an importance matrix, which guides the encoders.
    finder : Finder, optional
        As of `load_recipe`.
    out_format : str
        gguf, or hf for a Hugging Face directory.
    """
    reader = ValueReader(None, finder=finder)
    reader.base_path = reader.model_path(base, "--base") if base is not None else None
    inputs = []
    for text, weight in models:
        own = {} if weight is None else {"weight": reader.rules(weight, f"the weight of {text}")}
        inputs.append(ModelInput(reader.model_path(text, "model"), parameters=own))
    return Recipe(
        method=method,
        base=reader.base_path,
        slices=(Slice(tuple(inputs)),),
        parameters=reader.parameters(dict(parameters or {}), "-P"),
        defaults={"weight": (Rule(1.0),)},
        out_type=out_type,
        memory=memory,
        seed=reader.seed(seed, "seed"),
        align=check_alignment(align) if align is not None else None,
        neurons=neurons,
        tensor_types=tuple(tensor_types),
        imatrix=find_imatrix(imatrix) if imatrix is not None else None,
        notes=tuple(reader.notes),
        out_format=check_format(out_format),
    )


def find_imatrix(path: str) -> Path:
    """Find the importance matrix that a flag names.

    Raises
    ------
    RecipeError
        There is no such file.
    """
    return ValueReader(None).file_path(path, "--imatrix")
