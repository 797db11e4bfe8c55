"""Rows of a tensor of tokens, brought together from the inputs that have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.token_rows import MEAN, PADDING, ZERO, RowMap
from edgemerge.types import Float32, TensorJob

__all__ = ["TokenRowReader"]

# Decodes rows [start, stop) of an input, which are the output's from `at` on; None: lent to another input.
DecodeRows: TypeAlias = Callable[[int, int, int, int | None, Float32], None]
TakeMemory: TypeAlias = Callable[[tuple[int, ...], type[np.generic]], NDArray[np.generic]]


class TokenRowReader:
    """Decodes rows of one input in the output's order.

    Parameters
    ----------
    job : TensorJob
        With a map of rows.
    take : callable
        Takes memory from the worker's arena, as `edgemerge.planning.token_maps.memory_of_rows` says.
    decode : callable
        Decodes consecutive rows of an input.
    """

    def __init__(self, job: TensorJob, take: TakeMemory, decode: DecodeRows) -> None:
        assert job.rows is not None
        self._map: RowMap = job.rows
        self._decode = decode
        self._n_cols, self._n_inputs = job.out.n_cols, len(job.inputs)
        row = self._n_cols if self._map.has_means else 0
        self._row = take((row,), np.float32).view(np.float32)
        self._means: dict[int, Float32] = {}  # input -> mean of all its rows
        if self._map.n_padding:
            self._height = max(1, job.rows_per_block)
            self._sum = take((self._n_cols,), np.float64).view(np.float64)
            self._places = take((self._n_inputs, self._n_cols), np.float32).view(np.float32)
            self._block = take((self._height * self._n_cols,), np.float32).view(np.float32)

    def decode(
        self, i_input: int, start: int, stop: int, out_f32: Float32, *, counts: bool = True
    ) -> None:
        """Fill `out_f32` ((stop - start) * n_cols,) with the output's rows [start, stop) of an input.

        `counts`: whether these rows become rows of the output, and not only part of a mean.
        """
        for run in self._map.runs(i_input, start, stop):
            n_rows = run.stop - run.start
            at = (run.start - start) * self._n_cols
            values = out_f32[at : at + n_rows * self._n_cols]
            if run.donor == ZERO:
                values[:] = 0
            elif run.donor == MEAN:
                self._average(run.start, run.stop, values)
            elif run.donor == PADDING:
                values.reshape(n_rows, self._n_cols)[:] = self._mean_of_tokens(i_input)
            else:
                place = run.start if counts and run.donor == i_input else None
                self._decode(run.donor, run.row, run.row + n_rows, place, values)

    def _average(self, start: int, stop: int, out_f32: Float32) -> None:
        """Average the rows of the inputs that have these tokens, in their order (mergekit embed.py)."""
        for i, row in enumerate(range(start, stop)):
            values = out_f32[i * self._n_cols : (i + 1) * self._n_cols]
            values[:], count = 0, 0
            for donor in range(self._n_inputs):
                if self._map.donors[donor][row] == donor:
                    first = int(self._map.rows[donor][row])
                    self._decode(donor, first, first + 1, None, self._row)
                    values += self._row
                    count += 1
            values /= np.float32(count)

    def _mean_of_tokens(self, i_input: int) -> Float32:
        """Return the mean of an input's rows of all tokens, summed in row order in float64.

        As https://nlp.stanford.edu/~johnhew/vocab-expansion.html has it for rows without a token.
        """
        if i_input not in self._means:
            n_tokens = self._map.n_rows - self._map.n_padding
            self._sum[:] = 0
            for start in range(0, n_tokens, self._height):
                stop = min(n_tokens, start + self._height)
                values = self._block[: (stop - start) * self._n_cols]
                self.decode(i_input, start, stop, values, counts=False)
                for row in values.reshape(stop - start, self._n_cols):
                    self._sum += row
            self._places[i_input] = self._sum / n_tokens
            self._means[i_input] = self._places[i_input]
        return self._means[i_input]
