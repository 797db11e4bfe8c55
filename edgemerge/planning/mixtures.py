"""Opens a mixture of experts for a merge, or to check one, when its gates are made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from edgemerge.errors import OutputError
from edgemerge.experts import Mixture
from edgemerge.formats.mixture import MixtureSource, open_mixture
from edgemerge.remote.stand_ins import is_remote
from edgemerge.types import ModelInput, Recipe, Slice

__all__ = ["open_with_gates"]


def open_with_gates(
    recipe: Recipe,
    mixture: Mixture,
    folder: Path,
    stack: ExitStack,
    merge_one: Callable[[Recipe, Path], object],
) -> MixtureSource:
    """Open all models of a recipe's mixture, and make its gates; the stack closes them.

    A base whose hidden states are wanted is run by llama.cpp, which reads GGUF. Of a directory, or of a file
    on another machine, one is made in `folder` by `merge_one`, and removed.

    Raises
    ------
    EdgemergeError
        As of `open_mixture`.
    """
    is_elsewhere = is_remote(mixture.base)
    if not (mixture.runs_base and (mixture.base.is_dir() or is_elsewhere)):
        return open_mixture(mixture, recipe.seed, stack)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".edgemerge-", dir=folder)
    except OSError as error:
        raise OutputError(
            f"cannot have a copy of the base for a while ({error.strerror}); make room there, or give the "
            "base as a GGUF",
            path=folder,
        ) from error
    with temporary as name:
        made = Path(name) / "base.gguf"
        copy = Recipe(
            "passthrough",
            None,
            (Slice((ModelInput(mixture.base),)),),
            out_type=None if mixture.base.is_dir() else "keep",
            memory=recipe.memory,
        )
        merge_one(copy, made)
        return open_mixture(mixture, recipe.seed, stack, runnable=made)
