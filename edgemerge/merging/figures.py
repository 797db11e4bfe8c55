"""The figures of a comparison: sums over the weights of two models, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgemerge.types import Float64

__all__ = ["Sums", "TensorFigures"]


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the elements of a tensor, or of several.

    Left and right are A and B, or with a base their changes of it.
    """

    n: int  # elements
    grams: Float64  # (3, 3), of left, right, and right - left or with a base the base
    equal: int  # elements that are equal in A and B
    kept: tuple[int, int]  # elements that A and B have as the base has them; 0 without one
    both: int  # elements that are 0 in neither left nor right
    same_sign: int  # of them

    def __add__(self, other: Sums) -> Sums:
        """Add the sums of two tensors."""
        return Sums(
            self.n + other.n,
            self.grams + other.grams,
            self.equal + other.equal,
            (self.kept[0] + other.kept[0], self.kept[1] + other.kept[1]),
            self.both + other.both,
            self.same_sign + other.same_sign,
        )

    def norm(self, i: int) -> float:
        """Return the Euclidean norm of left (0), right (1) or the third (2)."""
        return math.sqrt(float(self.grams[i, i]))

    def cosine(self, i: int, k: int) -> float | None:
        """Return the cosine of two of the three; None where one of them is 0."""
        length = self.norm(i) * self.norm(k)
        return max(-1.0, min(1.0, float(self.grams[i, k]) / length)) if length else None


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """How one tensor compares; a stack of experts is one tensor."""

    name: str  # GGUF's
    shape: tuple[int, ...]  # of a matrix or vector; of a stack of experts, of one
    sums: Sums
    ranks: tuple[float | None, ...]  # of B - A; with a base, of A's change and of B's

    @property
    def cosine(self) -> float | None:
        """Cosine of A and B, or of their changes; None where one of them is 0."""
        return self.sums.cosine(0, 1)

    @property
    def norm_ratio(self) -> float | None:
        """Norm of B, or of its change, over that of A, or of its change; None where that is 0."""
        return self.sums.norm(1) / self.sums.norm(0) if self.sums.norm(0) else None

    @property
    def sign_agreement(self) -> float | None:
        """Part of the elements that are 0 in neither and have the same sign; None without any."""
        return self.sums.same_sign / self.sums.both if self.sums.both else None

    @property
    def unchanged(self) -> tuple[float, ...]:
        """Part of the elements that A and B have alike; with a base, as the base, of A and of B."""
        counts = (self.sums.equal,) if len(self.ranks) == 1 else self.sums.kept
        return tuple(count / self.sums.n for count in counts)
