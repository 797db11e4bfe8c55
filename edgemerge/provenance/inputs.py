"""Whether given models are those that a merged file says it was made of.

The provenance has a checksum of each input: the CRC-32 of the CRC-32s of the tensors that were read of it,
in the order of the output's (`edgemerge.merging.run`). Which tensors these were follows from the recipe, so
the jobs of the merge are drafted once more. Where heads or neurons were reordered, the checksums are of
reordered rows. Only the alignment itself could give these again, so such inputs are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from edgemerge.errors import VerificationError
from edgemerge.experts import MIXTURE_PATH, ExpertInput, Mixture
from edgemerge.finding.json_objects import parse_object
from edgemerge.formats import open_model
from edgemerge.formats.adapters.delta import DELTA
from edgemerge.formats.adapters.reference import model_name
from edgemerge.formats.inspection import Provenance, read_provenance
from edgemerge.formats.mixture import open_mixture
from edgemerge.methods.table import find_method
from edgemerge.planning.differences import join_stacks, list_changes
from edgemerge.planning.jobs import draft_jobs
from edgemerge.planning.mixtures import open_with_gates
from edgemerge.planning.vocabulary import Vocabulary, choose_vocabulary, names_outsider
from edgemerge.recipe.tokens import MAX_ROWS
from edgemerge.token_rows import RowMap, TokenRule
from edgemerge.types import (
    ModelInput,
    Parameters,
    Progress,
    Recipe,
    Rule,
    Slice,
    Source,
    TensorSpec,
)

__all__ = ["check_inputs"]

PIECE = 1 << 20  # bytes of rows that are read at a time; one row at least


def check_inputs(
    path: str | os.PathLike[str],
    given: Sequence[Path],
    *,
    progress: Progress | None = None,
    merge_one: Callable[[Recipe, Path], object] | None = None,
) -> None:
    """See that models are the inputs of a merged file, going by the checksums that it states.

    Parameters
    ----------
    path : path
        The merged GGUF.
    given : sequence of Path
        All of its inputs, in any order, under the names that they had.
    progress : callable, optional
        Called with bytes read and bytes in all, from this thread.
    merge_one : callable, optional
        `edgemerge.merging.run.merge`. It makes a GGUF of a mixture's base, where that is a directory whose
        hidden states made the gates. Without it such a mixture is refused.

    Raises
    ------
    VerificationError
        One is missing or another model; or the file does not allow to tell.
    EdgemergeError
        A model is damaged, or does not fit to the others.
    """
    path = Path(path)
    with ExitStack() as stack:
        merged = _open(path, stack)
        provenance = read_provenance(merged.metadata())
        if provenance is None:
            raise VerificationError("has no provenance section, so it names no inputs", path=path)
        if provenance.method == DELTA:
            models, found = _check_delta(provenance, given, path, stack, progress)
            _compare(models, found, provenance, path)
            return
        recipe = _read_recipe(provenance, given, path)
        _refuse_aligned(recipe, path)
        if recipe.mixture is not None:
            mixture = _open_mixture(recipe, recipe.mixture, path, stack, merge_one)
            sources: dict[Path, Source] = {MIXTURE_PATH: mixture}
        else:
            sources = {model: _open(model, stack) for model in recipe.models()}
        # A model that gave nothing but its tokens is not needed: the merged file has them.
        outside = merged if names_outsider(recipe) else None
        vocabulary = choose_vocabulary(recipe, sources, outside)
        found = _checksums(recipe, sources, vocabulary, progress)
    _compare(recipe.models(), found, provenance, path)


def _compare(
    models: Sequence[Path], found: Sequence[int], provenance: Provenance, path: Path
) -> None:
    stated = [checksum for _, checksum in provenance.inputs]
    for model, checksum, wanted in zip(models, found, stated, strict=True):
        if f"{checksum:08x}" != wanted:
            raise VerificationError(
                f"is not the input of that name: its tensors have the checksum {checksum:08x}, and "
                f"{path.name} was made of {wanted}; give the model that was merged",
                path=model,
            )


def _check_delta(
    provenance: Provenance,
    given: Sequence[Path],
    path: Path,
    stack: ExitStack,
    progress: Progress | None,
) -> tuple[list[Path], list[int]]:
    """Return base and expert of a delta, and their checksums: of all that `list_changes` compares."""
    names = [name for name, _ in provenance.inputs]
    if len(names) != 2:
        raise _unreadable(path)
    paths = _match_names(names, given, path)
    models = [paths[name] for name in names]
    sources = [_open(model, stack) for model in models]
    changes = join_stacks(list_changes(*sources)[0])
    found, done = [0, 0], 0
    total = sum(spec.nbytes for change in changes for spec in change.specs)
    for change in changes:
        for i, (source, spec) in enumerate(zip(sources, change.specs, strict=True)):
            checksum = _checksum(source, spec, [(0, spec.n_rows)])
            found[i] = crc32(checksum.to_bytes(4, "little"), found[i])
            done += spec.nbytes
            if progress is not None:
                progress(done, total)
    return models, found


def _open(path: Path, stack: ExitStack) -> Source:
    source = open_model(path)
    stack.callback(source.close)
    return source


def _match_names(names: Sequence[str], given: Sequence[Path], path: Path) -> dict[str, Path]:
    """Find the given model for each name that the provenance states."""
    found = {model_name(model.absolute()): model for model in given}
    if len(set(names)) < len(names) or len(found) < len(given):
        raise VerificationError(
            "has inputs of one name, which cannot be told apart, or was given one twice", path=path
        )
    if others := sorted(found.keys() - set(names)):
        raise VerificationError(
            f"was made of {', '.join(names)}; {others[0]} is none of these, leave it out", path=path
        )
    if missing := [name for name in names if name not in found]:
        raise VerificationError(
            f"was made of {', '.join(names)}; give all of them with --input ({missing[0]} is missing)",
            path=path,
        )
    return found


def _refuse_aligned(recipe: Recipe, path: Path) -> None:
    align = recipe.align or find_method(recipe.method).align
    if align != "off" or recipe.matches_neurons:
        raise VerificationError(
            "was aligned before it was merged, and its inputs' checksums are of the rows in their new "
            "order; these can only be had by merging again",
            path=path,
        )


def _open_mixture(
    recipe: Recipe,
    mixture: Mixture,
    path: Path,
    stack: ExitStack,
    merge_one: Callable[[Recipe, Path], object] | None,
) -> Source:
    """Open a mixture, whose gates are made again; beside it, where its base has to become a GGUF."""
    if merge_one is not None:
        return open_with_gates(recipe, mixture, path.absolute(), stack, merge_one)
    if mixture.runs_base and mixture.base.is_dir():
        raise VerificationError(
            "has gates of what its base computes, which llama.cpp can tell of a GGUF file and not of a "
            "directory; check it by edgemerge verify",
            path=path,
        )
    return open_mixture(mixture, recipe.seed, stack)


# -- the recipe ------------------------------------------------------------------------------------


def _read_recipe(provenance: Provenance, given: Sequence[Path], path: Path) -> Recipe:
    """Rebuild as much of the recipe as says which tensors were read; it may be a stranger's."""
    stated = parse_object(provenance.recipe.encode(), path)
    source = stated.get("tokenizer_source")
    names = [name for name, _ in provenance.inputs]
    try:
        if "mixture" in stated:
            names = _names_in_mixture(stated["mixture"])
    except (AttributeError, LookupError, TypeError) as error:
        raise _unreadable(path) from error
    paths = _match_names(names, given, path)
    if "mixture" in stated:
        paths = {**paths, str(MIXTURE_PATH): MIXTURE_PATH}
    try:
        recipe = Recipe(
            method=str(stated["method"]),
            base=None if stated["base"] is None else paths[stated["base"]],
            slices=tuple(_read_slice(part, paths) for part in stated["slices"]),
            parameters=_read_parameters(stated["parameters"]),
            defaults=_read_parameters(stated["defaults"]),
            align=None if stated["align"] is None else str(stated["align"]),
            neurons=bool(stated["neurons"]),
            seed=int(stated["seed"]),
            mixture=_read_mixture(stated["mixture"], paths) if "mixture" in stated else None,
            tokenizer_source=None if source is None else str(paths.get(source, source)),
            tokens=_read_rules(stated.get("tokens", {}), paths),
            pad_to_multiple_of=_read_multiple(stated.get("pad_to_multiple_of")),
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(path) from error
    models = tuple(paths[name] for name, _ in provenance.inputs)
    if recipe.models() != models or not all(part.inputs for part in recipe.slices):
        raise _unreadable(path)
    return recipe


def _unreadable(path: Path) -> VerificationError:
    return VerificationError(
        "states a recipe that this edgemerge cannot read, so its inputs cannot be checked",
        path=path,
    )


def _names_in_mixture(stated: Mapping[str, Any]) -> list[str]:
    names = [stated["base"], *(expert["path"] for expert in stated["experts"])]
    return list(dict.fromkeys(map(str, names)))


def _read_mixture(stated: Mapping[str, Any], paths: Mapping[str, Path]) -> Mixture:
    experts = tuple(
        ExpertInput(
            paths[expert["path"]],
            tuple(map(str, expert["positive_prompts"])),
            tuple(map(str, expert["negative_prompts"])),
            None if expert["residual_scale"] is None else float(expert["residual_scale"]),
        )
        for expert in stated["experts"]
    )
    gate_mode, per_token = str(stated["gate_mode"]), int(stated["experts_per_token"])
    return Mixture(paths[stated["base"]], experts, gate_mode, per_token)


def _read_slice(stated: Mapping[str, Any], paths: Mapping[str, Path]) -> Slice:
    inputs = []
    for model in stated["inputs"]:
        layers = model["layer_range"]
        if layers is not None:
            first, last = layers
            layers = int(first), int(last)
            if not 0 <= layers[0] <= layers[1]:
                raise ValueError("no range")
        inputs.append(
            ModelInput(paths[model["path"]], layers, _read_parameters(model["parameters"]))
        )
    base = stated.get("base")
    return Slice(
        tuple(inputs),
        _read_parameters(stated["parameters"]),
        None if base is None else paths[base],
    )


def _read_parameters(stated: Mapping[str, Any]) -> Parameters:
    return {name: tuple(map(_read_rule, rules)) for name, rules in stated.items()}


def _read_rule(stated: Mapping[str, Any]) -> Rule:
    value, name = stated["value"], stated["filter"]
    if isinstance(value, list):
        value = tuple(x if isinstance(x, bool | str) else float(x) for x in value)
    elif isinstance(value, int | float):
        float(value)  # no float has hundreds of digits
    elif not isinstance(value, str):
        raise TypeError("neither a number nor a word")
    return Rule(value, None if name is None else str(name))


def _read_rules(
    stated: Mapping[str, Mapping[str, Any]], paths: Mapping[str, Path]
) -> dict[str, TokenRule]:
    return {
        str(text): TokenRule(
            str(rule["source"]),
            None if rule["model"] is None else paths[rule["model"]],
            rule["token"] if isinstance(rule["token"], str | int) else None,
            bool(rule["force"]),
        )
        for text, rule in stated.items()
    }


def _read_multiple(stated: object) -> int | None:
    if stated is not None and (type(stated) is not int or not 0 < stated <= MAX_ROWS):
        raise ValueError("no number of rows")
    return stated


# -- the checksums ---------------------------------------------------------------------------------


def _checksums(
    recipe: Recipe,
    sources: Mapping[Path, Source],
    vocabulary: Vocabulary,
    progress: Progress | None,
) -> list[int]:
    """Compute the checksum of each input, as the merge did."""
    models = recipe.models()
    found = [0] * len(models)
    drafts = draft_jobs(recipe, find_method(recipe.method), models, sources, vocabulary)
    tensors = [(t, i, d.rows) for d in drafts for i, t in enumerate(d.inputs)]
    done, total = 0, sum(tensor.spec.nbytes for tensor, _, _ in tensors)
    for tensor, i, rows in tensors:
        checksum = _checksum(
            sources[models[tensor.model]], tensor.spec, _runs(tensor.spec, i, rows)
        )
        found[tensor.model] = crc32(checksum.to_bytes(4, "little"), found[tensor.model])
        done += tensor.spec.nbytes
        if progress is not None:
            progress(done, total)
    return found


def _runs(spec: TensorSpec, i_input: int, rows: RowMap | None) -> Iterator[tuple[int, int]]:
    """Yield which rows were read of an input: all, or those of the output's tokens in their order."""
    if rows is None:
        yield 0, spec.n_rows
        return
    for run in rows.runs(i_input, 0, rows.n_rows):
        if run.donor == i_input:
            yield run.row, run.row + run.stop - run.start


def _checksum(source: Source, spec: TensorSpec, runs: Iterable[tuple[int, int]]) -> int:
    """Compute the CRC-32 of rows of a tensor, one run after the other, as they are stored."""
    step = max(1, PIECE // max(1, spec.row_bytes))
    checksum = 0
    for first, last in runs:
        for start in range(first, last, step):
            stop = min(start + step, last)
            raw_u8 = np.empty((stop - start) * spec.row_bytes, np.uint8)
            source.read_rows(spec.name, start, stop, raw_u8)
            checksum = crc32(raw_u8.data, checksum)
    source.forget(spec.name)
    return checksum
