"""Writes what was extracted: a PEFT directory, or a GGUF adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from edgemerge.errors import MismatchError
from edgemerge.formats.adapters.config import ADAPTER_CONFIG
from edgemerge.formats.adapters.layout import (
    AdapterLayout,
    ExtractedTensor,
    gguf_layout,
    peft_layout,
)
from edgemerge.formats.adapters.peft import WEIGHTS
from edgemerge.merging.adapter_parts import AdapterPart, Extracted, GgufParts, Spool
from edgemerge.merging.peft_parts import PeftParts
from edgemerge.output.file import OutputFile, finishing, sync_folder
from edgemerge.types import Float32, Source, UInt8

__all__ = ["encode_part", "output_paths", "write_adapter", "write_peft"]

PIECE = 1 << 18  # numbers that are encoded at once


def output_paths(output: Path) -> tuple[Path, ...]:
    """Return the files that an adapter of that name will be."""
    if output.suffix == ".gguf":
        return (output,)
    return output / WEIGHTS, output / ADAPTER_CONFIG


def write_adapter(
    output: Path,
    base: Source,
    found: Sequence[Extracted],
    spool: Spool,
    dtype: str,
    check: Callable[[], None],
) -> list[str]:
    """Write an adapter.

    Parameters
    ----------
    output : Path
        A file for llama.cpp where it ends in .gguf, else a directory for PEFT.
    base : Source
        What the adapter is for.
    found : sequence of Extracted
        In the order of the base's tensors.
    spool : Spool
        Where the factors are.
    dtype : str
        F32 or F16.
    check : callable
        Raises OutputError where a file must not be replaced; called just before that.

    Returns
    -------
    list of str
        A sentence for each change that the adapter cannot have.

    Raises
    ------
    OutputError
        The files cannot be written; then there is none of them.
    MismatchError
        A matrix has no name that PEFT would find.
    """
    alpha = float(max((one.rank for one in found), default=1) or 1)
    if output.suffix == ".gguf":
        parts, notes = GgufParts(base, spool, dtype, alpha).make(found)
        tensors = [part.tensor for part in parts]
        layout = gguf_layout(tensors, base, alpha)
        with OutputFile(output, layout.n_bytes) as file:
            _fill(file, layout, parts)
            check()
            file.publish()
        return notes
    parts, config, notes = PeftParts(base, spool, dtype, alpha).make(found)
    write_peft(output, parts, config, check)
    return notes


def write_peft(
    output: Path,
    parts: Sequence[AdapterPart],
    config: bytes,
    check: Callable[[], None] | None = None,
) -> None:
    """Write a PEFT directory: adapter_config.json last, without which it is no adapter.

    An adapter that is replaced stays whole until both files are on the disk. Its adapter_config.json goes
    before its weights do: at no time are one's weights beside the other's ranks. `check` is as of
    `write_adapter`.

    Raises
    ------
    OutputError
        The files cannot be written; what was there is as it was, unless the last step failed.
    """
    layout, settings = peft_layout([part.tensor for part in parts]), output / ADAPTER_CONFIG
    with ExitStack() as stack:
        if not output.exists():
            output.mkdir()
            stack.callback(_remove_empty, output)
        with (
            OutputFile(output / WEIGHTS, layout.n_bytes) as weights_file,
            OutputFile(settings, len(config)) as settings_file,
        ):
            _fill(weights_file, layout, parts)
            settings_file.write(config, 0)
            weights_file.sync()
            settings_file.sync()
            if check is not None:
                check()
            with finishing(output):
                settings.unlink(missing_ok=True)
                sync_folder(output)
            weights_file.rename()
            settings_file.rename()
        stack.pop_all()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _fill(file: OutputFile, layout: AdapterLayout, parts: Sequence[AdapterPart]) -> None:
    file.write(layout.header, 0)
    for part in parts:
        at = layout.offsets[part.tensor.name]
        for piece in encode_part(part):
            file.write(piece, at)
            at += piece.nbytes


def encode_part(
    part: AdapterPart, wider: str = "--type F32, or smaller weights"
) -> Iterator[UInt8]:
    """Make a tensor of an adapter, as it is stored, piece after piece.

    Parameters
    ----------
    part : AdapterPart
        What makes it.
    wider : str
        What to give where F16 cannot hold a number.

    Raises
    ------
    MismatchError
        A value is larger than the type holds.
    """
    for make in part.makes:
        values = make()
        assert values.shape == part.tensor.shape[-values.ndim :]
        n_rows = max(1, PIECE // math.prod(values.shape[1:]))
        for i in range(0, len(values), n_rows):
            yield _encode(values[i : i + n_rows], part.tensor, wider)


def _encode(values: Float32, tensor: ExtractedTensor, wider: str) -> UInt8:
    stored = np.dtype({"F32": "<f4", "F16": "<f2"}[tensor.dtype])
    with np.errstate(over="ignore"):
        raw = np.ascontiguousarray(values).astype(stored, copy=False)
    if not np.isfinite(raw).all():
        remedy = "smaller weights" if stored.itemsize == 4 else wider
        raise MismatchError(
            f"{tensor.name!r} reaches numbers that {tensor.dtype} cannot hold; give {remedy}",
            tensor=tensor.name,
        )
    return raw.view(np.uint8).reshape(-1)
