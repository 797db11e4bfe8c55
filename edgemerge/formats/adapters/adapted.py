"""Models with adapters or deltas, as planning and merging see them: without what opens adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from edgemerge.types import Float32, Source, UInt8

__all__ = ["AdaptedSource", "HoldingSource", "held_bytes", "reading_bytes", "without_adapters"]


@runtime_checkable
class HoldingSource(Protocol):
    """A model that takes memory of its own, or reads from one that does."""

    def held_parts(self) -> Mapping[int, int]:
        """Bytes that all threads take to know what is changed, by the identity of what takes them."""


@runtime_checkable
class AdaptedSource(HoldingSource, Source, Protocol):
    """`edgemerge.formats.adapters.model.AdaptedModel`."""

    base: Source

    def read_on_base(
        self, name: str, start: int, stop: int, base_f32: Float32, out_u8: UInt8
    ) -> None:
        """Do as `read_rows` of a tensor that changes; `base_f32` has these rows of the base, decoded."""

    def changes(self, name: str) -> bool:
        """Tell whether a tensor is another one than the base's."""

    def kept_bytes(self) -> int:
        """Bytes of `work_bytes` that stay from one read to the next."""

    def passing_bytes(self) -> int:
        """Bytes of `work_bytes` that a read gives back."""


def without_adapters(source: Source) -> Source:
    """Return the model that adapters were added to, or the model itself where there are none."""
    return source.base if isinstance(source, AdaptedSource) else source


def reading_bytes(sources: Sequence[Source]) -> int:
    """Return the bytes that a thread takes to read several models, one block after the other."""
    adapted = [source for source in sources if isinstance(source, AdaptedSource)]
    kept = sum(source.kept_bytes() for source in adapted)
    passing = max((source.passing_bytes() for source in adapted), default=0)
    others = sum(s.work_bytes() for s in sources if not isinstance(s, AdaptedSource))
    return others + kept + passing


def held_bytes(sources: Iterable[Source]) -> int:
    """Return the bytes that adapters take in memory, for all threads; what they have alike counts once."""
    parts: dict[int, int] = {}
    for source in sources:
        if isinstance(source, HoldingSource):
            parts |= source.held_parts()
    return sum(parts.values())
