"""All experts of a layer as one parameter, as an adapter of peft's `target_parameters` has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from edgemerge.formats.adapters.factors import Factor, StoredMatrix
from edgemerge.formats.adapters.forms import Order
from edgemerge.formats.adapters.updates import LowRank, Update

__all__ = ["ExpertFactors", "Stacks", "find_order"]


class Stacks(NamedTuple):
    """The experts of a layer in GGUF: names of gate, up and down, and the shape of gate."""

    gate: str
    up: str
    down: str
    shape: tuple[int, int, int]  # experts, inner, outer


class ExpertFactors(NamedTuple):
    """A and B of one parameter.

    A is (rank * experts, in) with one expert after the other, B (out, rank * experts) with the experts
    next to each other (`ParamWrapper.get_delta_weight`). gate and up are one parameter, one above the
    other or in turn. Versions of peft and transformers differ in which way round they have in and out.
    """

    stacks: Stacks
    a: StoredMatrix
    b: StoredMatrix

    @property
    def rank(self) -> int:
        """The rank of each expert's change."""
        return self.a.shape[0] // self.stacks.shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """GGUF's tensors that it changes: gate and up, or down; none where it fits neither."""
        gate, up, down, (n_experts, n_inner, n_outer) = self.stacks
        if self.a.shape[0] % n_experts or not self.rank:
            return ()
        given = {self._given, self._given[::-1]}
        if (2 * n_inner, n_outer) in given:
            return gate, up
        return (down,) if (n_outer, n_inner) in given else ()

    @property
    def _given(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def is_swapped(self) -> bool | None:
        """Whether in and out are the other way round than in GGUF; None of a square parameter."""
        _, n_inner, n_outer = self.stacks.shape
        if self._given[0] == self._given[1]:
            return None
        return self._given not in ((2 * n_inner, n_outer), (n_outer, n_inner))

    def updates(
        self, scale: float, *, swapped: bool, in_turn: bool
    ) -> Iterator[tuple[str, Update]]:
        """Make the updates of each expert, with the names of its tensors.

        Parameters
        ----------
        scale : float
            What the product is multiplied by.
        swapped : bool
            Whether in and out are the other way round.
        in_turn : bool
            Whether rows of gate and up follow each other in turn.
        """
        n_experts, n_inner, n_outer = self.stacks.shape
        step = len(self.names) if in_turn else 1
        for i, name in enumerate(self.names):
            is_down = name == self.stacks.down
            n_rows, n_cols = (n_outer, n_inner) if is_down else (n_inner, n_outer)
            first = i if step > 1 else i * n_rows
            for expert in range(n_experts):
                at = expert * self.rank
                if swapped:
                    left = Factor(self.a, (n_rows, self.rank), at, first, step, True)
                    right = Factor(self.b, (self.rank, n_cols), 0, expert, n_experts, True)
                else:
                    shape, order = (n_rows, self.rank), Order(step=step)
                    left = Factor(self.b, shape, first, expert, n_experts, order=order)
                    right = Factor(self.a, (self.rank, n_cols), at)
                yield name, Update(expert * n_rows, n_rows, change=LowRank(left, right, scale))


def find_order(parameters: Sequence[ExpertFactors]) -> bool | None:
    """Tell whether a file has in and out the other way round, by what is not square; None where unknown.

    gpt-oss has down as wide as high, and one version of peft trained all of a file.
    """
    orders = {one.is_swapped for one in parameters} - {None}
    return orders.pop() if len(orders) == 1 else None
