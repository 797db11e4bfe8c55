"""The nearest matrices of low rank to a change that is read by rows: a randomised range finder.

Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1. What is held of a change of m x n is m x k and
n x k numbers, k its rank and a few more. Blocks have a fixed height, so that no result depends on memory. The
small float64 products and decompositions are LAPACK's, whose last digits depend on the processor.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.native import KernelFile
from edgemerge.planning.differences import Change
from edgemerge.types import Float32, Float64

__all__ = ["Blocks", "Factors", "factorise", "factorise_change", "need_bytes"]

OVERSAMPLING = 8  # columns beside the rank, which make the range found the right one
SMALL = 32  # directions that cost next to nothing
FIRST_RANK = 16  # tried where a part of the energy is asked for
POWER_STEPS = 1  # passes twice over the change, for spectra that fall slowly
ENOUGH = 1 - 1e-9  # of the energy: the range is found
TINY = 1e-13  # eigenvalue of a Gram matrix, of the largest one, that is rounding
LARGEST = float(np.finfo(np.float32).max)
CHUNK = 4096  # rows that are float64 at a time
SUMS = 4096  # of the kernel

lora = KernelFile("lora")

Blocks: TypeAlias = Callable[[], Iterator[tuple[int, Float32]]]
"""Each call reads the change once: yields a first row and rows (n_rows, n_cols), in order."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A change of low rank, `left @ right`, and how much of the whole change it is."""

    left: Float32  # (n_rows, rank)
    right: Float32  # (rank, n_cols)
    kept: float  # sum of the squares that it keeps
    total: float  # sum of the squares of the change

    @property
    def rank(self) -> int:
        """Its rank."""
        return len(self.right)


def factorise(
    blocks: Blocks, shape: tuple[int, int], *, rank: int | None, energy: float | None, seed: int
) -> Factors | None:
    """Find the best factors of a rank, or the smallest rank that keeps a part of the energy.

    Parameters
    ----------
    blocks : Blocks
        Reads the change.
    shape : (int, int)
        Its rows and columns.
    rank : int, optional
        At most so much.
    energy : float, optional
        Part of the sum of squares that is kept, from 0 to 1, as far as the rank allows.
    seed : int
        Of the random signs that the range is found with.

    Returns
    -------
    Factors or None
        None where nothing changed.

    Raises
    ------
    OverflowError
        Its numbers are so large that float32 does not hold sums of them.
    """
    most = min(shape)
    limit = most if rank is None else min(rank, most)
    wanted = limit if energy is None else min(limit, FIRST_RANK)
    while True:
        width = _width(shape, wanted)
        found = _decompose(blocks, shape, width, seed)
        if found is None:
            return None
        left, right, squares, total = found
        use = _choose_rank(squares, total, wanted, energy)
        kept = min(total, float(squares[:use].sum()))
        if energy is None or wanted == limit or kept >= energy * total:
            scale = np.sqrt(np.sqrt(squares[:use])).astype(np.float32)
            return Factors(left[:, :use] * scale, right[:use] / scale[:, None], kept, total)
        wanted = min(limit, 2 * wanted)


def factorise_change(
    change: Change, stop: threading.Event, *, rank: int, energy: float | None
) -> Factors | None:
    """Find the factors of what an expert changed of a matrix.

    Parameters
    ----------
    change : Change
        Of a matrix. Its rows are read several times.
    stop : Event
        As of `Change.pairs`.
    rank, energy
        As of `factorise`.

    Raises
    ------
    FormatError, Stopped
        As of `Change.pairs`; or the change is too large.
    """
    shape = change.shape[0], change.shape[1]
    seed = zlib.crc32(f"{change.name} {change.number}".encode())
    try:
        with np.errstate(over="ignore"):  # it is refused below
            return factorise(
                partial(change.blocks, stop), shape, rank=rank, energy=energy, seed=seed
            )
    except OverflowError as error:
        raise FormatError(
            "is so far from the base's that float32 cannot hold the change; get the model again",
            path=change.expert.path,
            tensor=change.name,
        ) from error


def need_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes that `factorise` takes at most for a rank, without the blocks."""
    width = _width(shape, rank)
    arrays = 4 * width * (2 * shape[0] + 4 * shape[1])
    return arrays + 24 * width * CHUNK + 64 * width * width


def _width(shape: tuple[int, int], rank: int) -> int:
    """Return how many directions are followed to find a rank; all of a small matrix."""
    return min(*shape, max(SMALL, rank + OVERSAMPLING))


def _choose_rank(squares: Float64, total: float, wanted: int, energy: float | None) -> int:
    """Return how many directions are used: no more than wanted, or than the energy needs."""
    real = int(np.count_nonzero(squares > TINY * squares[0]))
    use = max(1, min(wanted, real))
    if energy is not None:
        use = min(use, int(np.searchsorted(np.cumsum(squares), energy * total)) + 1)
    return use


def _decompose(
    blocks: Blocks, shape: tuple[int, int], width: int, seed: int
) -> tuple[Float32, Float32, Float64, float] | None:
    """Return orthonormal columns (m, k), rows (k, n), the squares of singular values, and their true sum.

    The change is nearly columns @ rows, and row i has the norm of singular value i. None where it is 0.
    """
    product, total = _times(blocks, shape[0], _first_directions(shape[1], width, seed))
    if total == 0.0:
        return None
    if not total * shape[1] < LARGEST**2:  # no product below is longer than that of signs and a row
        raise OverflowError("the change is too large for float32")
    basis = np.eye(width, dtype=np.float32) if width == shape[0] else _orthonormal(product)
    for step in range(POWER_STEPS + 1):
        rows = _transposed_times(blocks, basis, shape[1])
        gram = _gram(rows.T)
        if step == POWER_STEPS or float(np.trace(gram)) >= ENOUGH * total:
            break
        basis = _orthonormal(_times(blocks, shape[0], _orthonormal(rows.T))[0])
    values, vectors = np.linalg.eigh(gram)
    order = np.argsort(values)[::-1]
    turned = vectors[:, order].astype(np.float32)
    squares = np.maximum(values[order], 0.0)
    return basis @ turned, turned.T @ rows, squares, total


def _times(blocks: Blocks, n_rows: int, right: Float32) -> tuple[Float32, float]:
    """Return the change times a matrix, and the sum of the change's squares."""
    product = np.zeros((n_rows, right.shape[1]), np.float32)
    right = np.ascontiguousarray(right)
    sums = np.empty(SUMS, np.float32)
    total = 0.0
    for first, rows in blocks():
        lora.add_product(rows, right, 1.0, sums, product[first : first + len(rows)])
        total += float(np.einsum("ij,ij->", rows, rows, dtype=np.float64))
    return product, total


def _transposed_times(blocks: Blocks, left: Float32, n_cols: int) -> Float32:
    """Return a matrix, transposed, times the change."""
    product = np.zeros((left.shape[1], n_cols), np.float32)
    sums = np.empty(SUMS, np.float32)
    for first, rows in blocks():
        part = np.ascontiguousarray(left[first : first + len(rows)].T)
        lora.add_product(part, rows, 1.0, sums, product)
    return product


def _orthonormal(columns: Float32) -> Float32:
    """Return orthonormal columns of the same span, fewer where it is smaller: by Gram matrices, twice."""
    for _ in range(2):
        values, vectors = np.linalg.eigh(_gram(columns))
        real = values > TINY * values[-1]
        turned = vectors[:, real] / np.sqrt(values[real])
        found = np.empty((len(columns), turned.shape[1]), np.float32)
        for start in range(0, len(columns), CHUNK):
            part = columns[start : start + CHUNK].astype(np.float64)
            found[start : start + CHUNK] = part @ turned
        columns = found
    return columns


def _gram(columns: Float32) -> Float64:
    """Return the products of all pairs of columns."""
    gram = np.zeros((columns.shape[1], columns.shape[1]))
    for start in range(0, len(columns), CHUNK):
        part = columns[start : start + CHUNK].astype(np.float64)
        gram += part.T @ part
    return gram


def _first_directions(n_cols: int, width: int, seed: int) -> Float32:
    """Return what a change is first multiplied with, (n_cols, width): random signs, or all of the axes."""
    if width == n_cols:  # a square matrix of signs is often singular
        return np.eye(width, dtype=np.float32)
    return _random_signs(n_cols, width, seed)


def _random_signs(n_rows: int, n_cols: int, seed: int) -> Float32:
    """Return a matrix of 1 and -1, the same with every version of NumPy (splitmix64)."""
    x = np.arange(1, n_rows * n_cols + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    signs = (x >> np.uint64(63)).astype(np.float32)
    return (np.float32(1) - np.float32(2) * signs).reshape(n_rows, n_cols)
