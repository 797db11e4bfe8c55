"""What an expert changed of its base, matrix by matrix, read by rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgemerge.errors import FormatError, Stopped
from edgemerge.formats.constants import is_constant
from edgemerge.formats.quants.codec import CODECS, find_codec
from edgemerge.planning.compatibility import (
    check_models,
    find_head,
    has_elements,
    is_scale,
    missing_tensor,
    same_scale,
    same_shape,
)
from edgemerge.planning.vocabulary import EMBEDDING, OUTPUT
from edgemerge.types import Float32, Source, TensorSpec, UInt8

__all__ = ["PIECE", "Change", "join_stacks", "list_changes"]

PIECE = 1 << 18  # elements of both models that are compared at a time; one row at least


@dataclass(frozen=True, slots=True)
class Change:
    """One matrix of both models, or one vector; of a stack of experts, one expert's matrix."""

    name: str  # GGUF's
    shape: tuple[int, ...]  # of the matrix, or of the vector
    base: Source
    expert: Source
    specs: tuple[TensorSpec, TensorSpec]
    number: int | None = None  # of the expert in a stack
    count: int = 1  # of experts in the stack

    @property
    def is_vector(self) -> bool:
        """Whether it is kept whole, as no rank is lower than one."""
        return len(self.shape) == 1

    def blocks(self, stop: threading.Event) -> Iterator[tuple[int, Float32]]:
        """Read expert - base, rows after rows; raises as `pairs`."""
        for start, left, right in self.pairs(stop):
            yield start, right - left

    def pairs(self, stop: threading.Event) -> Iterator[tuple[int, Float32, Float32]]:
        """Read the same rows of base and expert, rows after rows, as high in every run.

        Raises
        ------
        FormatError
            A model holds NaN or infinity there.
        Stopped
            The event is set.
        """
        for start, left, right in self.stored(stop):
            yield start, *self.decode(left, right)

    def stored(self, stop: threading.Event) -> Iterator[tuple[int, UInt8, UInt8]]:
        """Read the same rows of base and expert as they are stored, rows after rows; raises `Stopped`."""
        n_rows, n_cols = self.shape if len(self.shape) > 1 else (1, *self.shape)
        first = 0 if self.number is None else self.number * n_rows
        height = max(1, PIECE // n_cols)
        for start in range(0, n_rows, height):
            if stop.is_set():
                raise Stopped
            rows = first + start, first + min(n_rows, start + height)
            left = _read_stored(self.base, self.specs[0], *rows)
            yield start, left, _read_stored(self.expert, self.specs[1], *rows)

    def decode(self, left_u8: UInt8, right_u8: UInt8) -> tuple[Float32, Float32]:
        """Decode rows of base and expert; raises FormatError where one holds NaN or infinity."""
        left = _decode(self.base, self.specs[0], left_u8)
        return left, _decode(self.expert, self.specs[1], right_u8)

    def forget(self) -> None:
        """Drop what was read from the page cache; a stack of experts after the last of them."""
        if self.number in (None, self.count - 1):
            for source, spec in zip((self.base, self.expert), self.specs, strict=True):
                source.forget(spec.name)

    def read_expert(self) -> Float32:
        """Read the expert's own vector."""
        return _read(self.expert, self.specs[1], 0, 1).reshape(-1)

    def block_bytes(self) -> int:
        """Bytes that `blocks` takes at most."""
        rows = min(max(1, PIECE // self.shape[-1]), self.shape[0])
        stored = sum(spec.row_bytes for spec in self.specs)
        return rows * (stored + 3 * 4 * self.shape[-1])


def list_changes(
    base: Source, expert: Source, *, by_text: bool = False
) -> tuple[list[Change], Sequence[str]]:
    """List all matrices and vectors of two models that fit together, and what is to be known of them.

    Where one of them has a head of its own, it is compared with the other's embedding, if that is its head.

    Parameters
    ----------
    base, expert : Source
        Open models.
    by_text : bool
        Whether vocabularies may differ; then matrices of tokens with other shapes are left out.

    Raises
    ------
    MismatchError, FormatError
        The models are no base and fine-tune.
    """
    notes = check_models([base, expert], by_text=by_text, remedy="give a base and its fine-tune")
    names = dict.fromkeys(base.specs())
    names |= {OUTPUT: None} if OUTPUT in expert.specs() else {}
    for name in expert.specs():
        if name not in names and not is_constant(name):
            raise missing_tensor(name, expert, base)
    changes: list[Change] = []
    for name in names:
        if is_constant(name):
            continue
        specs = find_head(base, name), find_head(expert, name)
        if by_text and name in (EMBEDDING, OUTPUT) and specs[0].shape != specs[1].shape:
            notes.append(f"{name} is left out, as the models have different numbers of tokens")
            continue
        same_shape(*specs, base, expert)
        has_elements(specs[0], base)
        if is_scale(name, base):
            same_scale(name, base, name, expert)
            continue
        for spec in specs:
            find_codec(spec)
        shape = specs[0].shape
        if len(shape) < 3:
            changes.append(Change(name, shape, base, expert, specs))
            continue
        count = specs[0].n_rows // shape[-2]
        changes += [
            Change(name, shape[-2:], base, expert, specs, number, count) for number in range(count)
        ]
    return changes, notes


def join_stacks(changes: Sequence[Change]) -> list[Change]:
    """Return one change for each tensor: the experts of a stack as one matrix."""
    return [
        one if one.number is None else replace(one, shape=_stacked(one.specs[0]), number=None)
        for one in changes
        if not one.number
    ]


def _stacked(spec: TensorSpec) -> tuple[int, int]:
    return spec.n_rows, spec.n_cols


def _read(source: Source, spec: TensorSpec, start: int, stop: int) -> Float32:
    return _decode(source, spec, _read_stored(source, spec, start, stop))


def _read_stored(source: Source, spec: TensorSpec, start: int, stop: int) -> UInt8:
    raw = np.empty((stop - start) * spec.row_bytes, np.uint8)
    source.read_rows(spec.name, start, stop, raw)
    return raw


def _decode(source: Source, spec: TensorSpec, raw_u8: UInt8) -> Float32:
    n_rows = raw_u8.size // spec.row_bytes
    values = np.empty((n_rows, spec.n_cols), np.float32)
    CODECS[spec.dtype].decode(raw_u8, values.reshape(-1))
    if not np.isfinite(values).all():
        raise FormatError(
            "holds NaN or infinity; that model is damaged, get it again",
            path=source.path,
            tensor=spec.name,
        )
    return values
