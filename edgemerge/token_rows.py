"""Which row of which input stands for a token: what a recipe says of one, and the map of a whole tensor.

Example: an output of 4 tokens from two inputs. Input 0 has the rows 0, 1, 2; input 1 has 0, 2 and a token of
its own. The map of input 0 says (0, row 0), (0, row 1), (0, row 2), (1, row 2): the last row is lent by
input 1. That of input 1 says (1, row 0), (0, row 1), (1, row 1), (1, row 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["MEAN", "PADDING", "ZERO", "Int16", "Int32", "RowMap", "Run", "TokenRule", "own_rows"]

# Instead of an input: zeros; the mean of the inputs' own rows; the mean of all tokens' rows.
ZERO, MEAN, PADDING = -1, -2, -3

Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenRule:
    """What a recipe says of one token's row (mergekit tokenizer/config.py, `TokenEmbeddingConfig`)."""

    source: str  # "default", "zero" or "model"
    model: Path | None = None
    token: str | int | None = None  # another token of the model, by its text or its id
    force: bool = False  # for all models, not only for those that lack the token


class Run(NamedTuple):
    """Consecutive rows of the output that are consecutive rows of one input, or of no input."""

    start: int
    stop: int
    donor: int  # number of the input, or ZERO, MEAN, PADDING
    row: int  # the input's row for `start`


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """Where the rows of a tensor of tokens come from.

    Attributes
    ----------
    donors : tuple of int16 array (n_rows,)
        For each input of the tensor, base first: whose row is taken, or ZERO, MEAN, PADDING.
    rows : tuple of int32 array (n_rows,)
        For each input: the row of that donor. It counts on where there is no donor.
    n_padding : int
        Rows at the end without a token.
    """

    donors: tuple[Int16, ...]
    rows: tuple[Int32, ...]
    n_padding: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of the output."""
        return int(self.rows[0].size)

    @property
    def n_bytes(self) -> int:
        """Memory that the map takes."""
        return sum(d.nbytes + r.nbytes for d, r in zip(self.donors, self.rows, strict=True))

    @property
    def has_means(self) -> bool:
        """Whether some row is a mean over inputs."""
        return any(bool((donors == MEAN).any()) for donors in self.donors)

    def runs(self, i_input: int, start: int, stop: int) -> Iterator[Run]:
        """Yield where rows [start, stop) of an input come from, in order."""
        donors, rows = self.donors[i_input][start:stop], self.rows[i_input][start:stop]
        breaks = np.flatnonzero((np.diff(donors) != 0) | (np.diff(rows) != 1)) + 1
        edges = [0, *breaks.tolist(), stop - start] if stop > start else []
        for first, last in pairwise(edges):
            yield Run(start + first, start + last, int(donors[first]), int(rows[first]))


def own_rows(rows: RowMap, i_input: int) -> Int32:
    """Return an input's rows that are taken for itself, in the order of the output."""
    taken: Int32 = rows.rows[i_input][rows.donors[i_input] == i_input]
    return taken
