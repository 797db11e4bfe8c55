"""Opens a mixture of experts for a merge, or to check one, when its gates are made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from edgemerge.errors import OutputError
from edgemerge.experts import Mixture
from edgemerge.formats.mixture import MixtureSource, open_mixture
from edgemerge.output.journal import journal_path
from edgemerge.remote.stand_ins import is_remote
from edgemerge.types import ModelInput, Recipe, Slice

__all__ = ["open_with_gates"]


def open_with_gates(
    recipe: Recipe,
    mixture: Mixture,
    output: Path,
    stack: ExitStack,
    merge_one: Callable[[Recipe, Path], object],
) -> MixtureSource:
    """Open all models of a recipe's mixture, and make its gates; the stack closes them.

    A base whose hidden states are wanted is run by llama.cpp, which reads GGUF. Of a directory, or of a file
    on another machine, one is made in `OUT.base.part/` by `merge_one`, and removed.

    Raises
    ------
    EdgemergeError
        As of `open_mixture`.
    """
    is_elsewhere = is_remote(mixture.base)
    if not (mixture.runs_base and (mixture.base.is_dir() or is_elsewhere)):
        return open_mixture(mixture, recipe.seed, stack)
    from edgemerge.output.folder import OutputFolder  # only these pay for it

    made = output.with_name(output.name + ".base") / "base.gguf"
    names = {made.name, journal_path(made).name}
    with ExitStack() as folder:
        try:  # takes over what a killed run left
            beside = folder.enter_context(OutputFolder(made.parent, names))
        except OutputError as error:
            error.add_note(
                "a copy of the base is made there for a while; or give the base as a GGUF"
            )
            raise
        made = beside.staging / made.name
        copy = Recipe(
            "passthrough",
            None,
            (Slice((ModelInput(mixture.base),)),),
            out_type=None if mixture.base.is_dir() else "keep",
            memory=recipe.memory,
        )
        made.unlink(missing_ok=True)  # there is room for one
        try:
            merge_one(copy, made)
            return open_mixture(mixture, recipe.seed, stack, runnable=made)
        finally:
            for file in list(beside.staging.glob("*")):
                file.unlink(missing_ok=True)
