"""Model files: reading GGUF and Hugging Face directories, laying out GGUF, codecs, file types."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from edgemerge.errors import FormatError, RecipeError
from edgemerge.formats.adapters.reference import AdapterUse, split_reference
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.remote.stand_ins import is_address
from edgemerge.suggestions import suggest_path
from edgemerge.types import Source

__all__ = ["OpenModels", "open_model"]


def open_model(path: str | os.PathLike[str]) -> Source:
    """Open a GGUF file or a Hugging Face directory, or one with adapters or deltas: BASE+ADAPTER.

    Raises
    ------
    FormatError
        It is neither, or it is damaged.
    MismatchError
        An adapter was made for another base.
    """
    path = Path(path)
    if (reference := split_reference(path)) is not None:
        return _adapt(path, open_model(reference.base), reference.adapters, closes_base=True)
    if path.is_dir():
        # Not always wanted, and a third of what reading models imports.
        from edgemerge.formats.hub.model import HubModel

        return HubModel(path)
    if path.exists() and not path.is_file():
        raise FormatError("is neither a file nor a folder; give a model", path=path)
    if path.suffix == ".safetensors":
        raise FormatError(
            "is only the weights of a model; give the folder, which has config.json too", path=path
        )
    try:
        return GgufModel(path)
    except OSError as error:
        if is_address(str(path)):
            from edgemerge.remote.any_address import refuse_address  # and all that reads URLs

            raise RecipeError(refuse_address(str(path))) from None
        hint = suggest_path(path) or "; check the path"
        raise FormatError(f"cannot be read ({error.strerror}){hint}", path=path) from None


def _adapt(path: Path, base: Source, uses: Sequence[AdapterUse], *, closes_base: bool) -> Source:
    """Open what is added to an open model."""
    # A merge without adapters does without these.
    from edgemerge.formats.adapters.model import AdaptedModel, open_adapter

    with ExitStack() as stack:
        if closes_base:
            stack.callback(base.close)
        adapters = []
        for use in uses:
            adapter = open_adapter(use.path, base)
            stack.callback(adapter.close)
            adapters.append((adapter, use.weight))
        adapted = AdaptedModel(path, base, adapters, closes_base=closes_base)
        stack.pop_all()
    return adapted


class OpenModels:
    """Models that are opened once: also the one that many adapters or deltas are added to.

    Parameters
    ----------
    stack : ExitStack
        Closes them.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._opened: dict[Path, Source] = {}

    def open(self, path: Path) -> Source:
        """Open a model, or return it where it is open; raises as `open_model`."""
        found = self._opened.get(path)
        if found is None:
            found = self._opened[path] = self._open(path)
            self._stack.callback(found.close)
        return found

    def _open(self, path: Path) -> Source:
        reference = split_reference(path)
        if reference is None:
            return open_model(path)
        base = self.open(reference.base)
        return _adapt(path, base, reference.adapters, closes_base=False)
