"""GGUF files that hold something else than a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import get_value

__all__ = ["check_is_model"]

_PROJECTOR = (
    "is the part of a model that sees or hears (mmproj), not the language model; "
    "give the language model's own GGUF"
)
# general.type, or general.architecture of files older than that key
_OTHERS = {
    "adapter": "is a LoRA adapter, not a model; give it with its base model, as in BASE+ADAPTER, or "
    "with --lora to run, chat or serve",
    "delta": "is a delta, not a model; merge or convert it with its base: --base BASE DELTA, or BASE+DELTA",
    "mmproj": _PROJECTOR,
    "clip": _PROJECTOR,
    "imatrix": "is an importance matrix, not a model; give it with --imatrix, beside a model",
    "controlvector": "is a control vector, not a model; give the model that it was made for",
}


def check_is_model(path: Path, metadata: Mapping[str, bytes]) -> None:
    """Refuse a GGUF that is no model, saying what it is.

    Parameters
    ----------
    path : Path
        The file.
    metadata : mapping of GGUF key to typed value
        Its header's.

    Raises
    ------
    FormatError
        It is an adapter, a delta, a projector, an importance matrix or a control vector.
    """
    for key in ("general.type", "general.architecture"):
        sentence = _OTHERS.get(str(get_value(metadata, key)))
        if sentence is not None:
            raise FormatError(sentence, path=path)
