"""Orthogonal matching pursuit: vectors as combinations of a few rows of a matrix that is read by blocks.

Pati, Rezaiifar and Krishnaprasad 1993, as mergekit tokensurgeon/omp.py has it. Each vector is a pursuit of
its own, so that no result depends on memory or threads. Sums are NumPy's and a kernel's; BLAS has no part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import FormatError
from edgemerge.formats.quants.codec import CODECS
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, Source, TensorSpec

__all__ = ["Rows", "block_bytes", "pursue", "target_bytes"]

PIECE = 1 << 18  # elements of the matrix that a thread compares at a time; one row at least
TILE = 128  # vectors that are compared with a block at a time, so that they stay in the cache
SUMS = 4096  # of the kernel
SMALL = 1e-6  # of a vector's norm: what is left is rounding
AT_ONCE = 64  # rows of a basis that are float64 at a time

Int32 = NDArray[np.int32]

lora = KernelFile("lora")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows of a tensor, in an order of their own."""

    source: Source
    spec: TensorSpec
    ids: Int32  # (n_rows,)
    held: Float32 | None = None  # all of them, (n_rows, n_cols), where memory has room

    def read(self, places: Int32) -> Float32:
        """Decode the rows at some places of the order: (n_places, n_cols).

        Raises
        ------
        FormatError
            One holds NaN or infinity.
        """
        if self.held is not None:
            return self.held[places]
        ids, n_cols = self.ids[places], self.spec.n_cols
        values = np.empty((len(ids), n_cols), np.float32)
        edges = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
        for first, last in pairwise(edges):
            if first == last:
                continue
            raw = np.empty((last - first) * self.spec.row_bytes, np.uint8)
            row = int(ids[first])
            self.source.read_rows(self.spec.name, row, row + last - first, raw)
            CODECS[self.spec.dtype].decode(raw, values[first:last].reshape(-1))
        if not np.isfinite(values).all():
            raise FormatError(
                "holds NaN or infinity; that model is damaged, get it again",
                path=self.source.path,
                tensor=self.spec.name,
            )
        return values

    def hold(self) -> Rows:
        """Return the same rows, read once."""
        everything = np.arange(len(self.ids), dtype=np.int32)
        return Rows(self.source, self.spec, self.ids, self.read(everything))


def target_bytes(n_cols: int, k: int) -> int:
    """Return the bytes that the pursuit of one vector takes."""
    return 4 * n_cols * k + 24 * n_cols + 8 * k * k + 40 * k


def block_bytes(n_cols: int, k: int, threads: int) -> int:
    """Return the bytes that a pursuit takes beside its vectors."""
    height = _height(n_cols)
    one = height * (8 * n_cols + 12 * TILE) + 4 * SUMS
    return threads * one + 24 * n_cols * (AT_ONCE + 1) + 16 * TILE * k


def _height(n_cols: int) -> int:
    return max(1, PIECE // n_cols)


def pursue(
    rows: Rows,
    targets: Float32,
    k: int,
    pool: ThreadPoolExecutor,
    step: Callable[[int], None],
) -> tuple[Int32, Float64]:
    """Find of each vector the rows that it is a combination of, and how much of each.

    Parameters
    ----------
    rows : Rows
        At least `k`.
    targets : float32 array (n_targets, n_cols)
        The vectors.
    k : int
        Rows of one combination at most; fewer where nothing is left of the vector.
    pool : ThreadPoolExecutor
        Compares blocks of rows.
    step : callable
        Called with the pairs of row and vector that were compared; may raise to stop.

    Returns
    -------
    places : int32 array (n_targets, k)
        Which of `rows`; -1 where a combination has fewer.
    coefficients : float64 array (n_targets, k)
        How much of each; 0 where there is none.
    """
    n_targets, n_cols = targets.shape
    places = np.full((n_targets, k), -1, np.int32)
    basis = np.zeros((n_targets, k, n_cols), np.float32)
    upper = np.zeros((n_targets, k, k))
    parts = np.zeros((n_targets, k))
    residuals = targets.astype(np.float64)
    norms = np.sqrt(np.square(targets, dtype=np.float64).sum(axis=1))
    is_open = norms > 0
    for t in range(k):
        if not is_open.any():
            step((k - t) * len(rows.ids) * n_targets)
            break
        best = _find_best(rows, residuals, places[:, :t], pool, step)
        for i in np.flatnonzero(is_open).tolist():
            atom = rows.read(best[i : i + 1])[0].astype(np.float64)
            rest = _orthogonal(atom, basis[i, :t], upper[i, :t, t])
            norm = _norm(rest)
            if norm <= SMALL * _norm(atom):
                is_open[i] = False  # all that is left of the vector is outside of the rows' span
                upper[i, :t, t] = 0
                continue
            places[i, t], upper[i, t, t] = best[i], norm
            basis[i, t] = rest / norm
            parts[i, t] = (basis[i, t] * residuals[i]).sum()
            residuals[i] -= parts[i, t] * basis[i, t]
            is_open[i] = _norm(residuals[i]) > SMALL * norms[i]
    return places, _solve(upper, parts)


def _norm(x: Float64) -> float:
    return float(np.sqrt(np.square(x).sum()))


def _orthogonal(atom: Float64, basis: Float32, projections: Float64) -> Float64:
    """Return what of a row is no combination of the basis (Gram-Schmidt, twice); adds up the projections."""
    rest = atom.copy()
    for _ in range(2):
        for start in range(0, len(basis), AT_ONCE):
            part = basis[start : start + AT_ONCE].astype(np.float64)
            found = (part * rest).sum(axis=1)
            projections[start : start + AT_ONCE] += found
            rest -= (found[:, None] * part).sum(axis=0)
    return rest


def _find_best(
    rows: Rows,
    residuals: Float64,
    places: Int32,
    pool: ThreadPoolExecutor,
    step: Callable[[int], None],
) -> Int32:
    """Find of each vector the row whose product with it is largest in absolute value, the first of equals."""
    n_targets, n_cols = residuals.shape
    tiles = [
        np.ascontiguousarray(residuals[start : start + TILE].T, np.float32)
        for start in range(0, n_targets, TILE)
    ]

    def compare(start: int) -> tuple[int, Float32, Int32]:
        stop = min(len(rows.ids), start + height)
        block = rows.read(np.arange(start, stop, dtype=np.int32))
        largest, where = np.empty(n_targets, np.float32), np.empty(n_targets, np.int32)
        sums = np.empty(SUMS, np.float32)
        for i, tile in enumerate(tiles):
            width = tile.shape[1]
            products = np.zeros((stop - start, width), np.float32)
            lora.add_product(block, tile, 1.0, sums, products)
            np.abs(products, out=products)
            chosen = places[i * TILE : i * TILE + width]
            taken, which = np.nonzero((chosen >= start) & (chosen < stop))
            products[chosen[taken, which] - start, taken] = -1
            found = products.argmax(axis=0)
            where[i * TILE : i * TILE + width] = found + start
            largest[i * TILE : i * TILE + width] = products[found, np.arange(width)]
        return stop - start, largest, where

    height = _height(n_cols)
    best, top = np.zeros(n_targets, np.int32), np.full(n_targets, -1, np.float32)
    for n_rows, largest, where in pool.map(compare, range(0, len(rows.ids), height)):
        is_larger = largest > top
        top[is_larger], best[is_larger] = largest[is_larger], where[is_larger]
        step(n_rows * n_targets)
    return best


def _solve(upper: Float64, parts: Float64) -> Float64:
    """Solve the triangular systems of all vectors; a row that was not taken gets 0."""
    found = np.zeros_like(parts)
    for t in range(parts.shape[1] - 1, -1, -1):
        rest = parts[:, t] - (upper[:, t, t + 1 :] * found[:, t + 1 :]).sum(axis=1)
        diagonal = upper[:, t, t]
        np.divide(rest, diagonal, out=found[:, t], where=diagonal > 0)
    return found
