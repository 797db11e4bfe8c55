"""The first singular directions of matrices that are read by rows, the same bytes everywhere.

Block power iteration on the side of the columns (Halko, Martinsson and Tropp 2011, algorithm 4.4). Of a
matrix of any height, what stays in memory is some vectors as long as a row. A step replaces them by
`matrix.T @ (matrix @ vectors)`, which one pass adds up row after row, and makes them orthonormal. Sums have
one order and the small decompositions are our own, so the result is that of any block height, worker count
and processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream
from edgemerge.methods.method import Described, WorkingMemory
from edgemerge.methods.shared_tensor import LargeSum, RowSum
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["DIRECTION_KERNELS", "POWER_STEPS", "Directions", "direction_memory"]
__all__ += ["eigenvectors", "has_directions", "multiply"]

products, small = KernelFile("matrix_products"), KernelFile("small_matrices")

POWER_STEPS = 2  # passes that find directions
SCRATCH_SHAPE = 4 + 64, 512 + 16  # 4 + DEPTH, WIDTH of kernels/matrix_products.py
SIGNS = 1 << 14  # random signs that are made at once
NOTHING = 1e-10  # squared singular value, of the largest, that is rounding

DIRECTION_KERNELS = (
    *(
        f"matrix_products.{name}"
        for name in ("add_product", "project", "add_gram", "orthonormalise")
    ),
    "small_matrices.decompose",
    "small_matrices.multiply",
)


def has_directions(tensor: Described) -> bool:
    """Tell whether a tensor is a matrix whose singular directions mean something.

    The rows of embeddings and of output heads are tokens, or places or kinds of them, and each is as good as
    a direction of its own.
    """
    is_matrix = len(tensor.experts[0].spec.shape) > 1
    stem = tensor.name.partition(".")[0]
    return is_matrix and not (stem == "output" or stem.endswith(("_embd", "_types")))


class Directions:
    """Vectors as long as a row for each of some matrices, and their products with the matrices' rows.

    Parameters
    ----------
    stream : BlockStream
        Gives the blocks and working memory.
    ranks : sequence of int
        How many vectors each of some matrices of the output's shape has, at most.

    Attributes
    ----------
    vectors : (n_vectors, n_cols) float32
        Those of all matrices. Orthonormal rows for each, or zeros where it has no more directions.
    """

    def __init__(self, stream: BlockStream, ranks: Sequence[int]) -> None:
        out = stream.job.out
        ranks = [min(rank, out.n_rows, out.n_cols) for rank in ranks]
        ends = np.cumsum(ranks).tolist()
        self.parts = [slice(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]
        self._stream = stream
        shape = (ends[-1], out.n_cols)
        self.vectors = stream.take(shape, np.float32).view(np.float32)
        self._sums = stream.take(shape, np.float32).view(np.float32)
        self._turned = stream.take((max(ranks), out.n_cols), np.float32).view(np.float32)
        n_products = ends[-1] * max(1, stream.job.rows_per_block)
        self._products = stream.take((n_products,), np.float32).view(np.float32)
        self._by_rows = stream.take((n_products,), np.float32).view(np.float32)
        self._scratch = stream.take(SCRATCH_SHAPE, np.float32).view(np.float32)
        self._lanes = stream.take((SUM_LANES,), np.float64)

    def of(self, i_matrix: int) -> Float32:
        """Return the vectors of one matrix, (rank, n_cols)."""
        return self.vectors[self.parts[i_matrix]]

    def find(
        self,
        matrices: Callable[[Block], Sequence[Float32] | Float32],
        which: Sequence[int] | None = None,
    ) -> None:
        """Find the first directions of the matrices, in `POWER_STEPS` passes.

        Parameters
        ----------
        matrices : callable
            Takes a block, returns its rows of every matrix, each (n_rows * n_cols,) float32.
        which : sequence of int, optional
            Numbers of these matrices; by default all.
        """
        which = range(len(self.parts)) if which is None else which
        for i in which:
            _fill_first(self.of(i))
        for _ in range(POWER_STEPS):
            sums = [self.sum_of_rows(self._sums[self.parts[i]]) for i in which]
            for block in self._stream.blocks():
                for i, total, rows in zip(which, sums, matrices(block), strict=True):
                    self.add(total, block, self.project(i, rows), rows)
            for i, total in zip(which, sums, strict=True):
                total.copy_to(self.of(i))
                products.orthonormalise(self.of(i), self._lanes)

    def project(self, i_matrix: int, rows: Float32) -> Float32:
        """Return the dot products of a matrix's rows with its vectors, (rank, n_rows).

        They lie one matrix after the other, and are overwritten by those of the next block.
        """
        part, table = self.parts[i_matrix], rows.reshape(-1, self.vectors.shape[1])
        own = self._products[part.start * len(table) : part.stop * len(table)]
        found = own.reshape(-1, len(table))
        products.project(table, self.vectors[part], self._scratch, found)
        return found

    def project_all(self, matrices: Sequence[Float32] | Float32) -> Float32:
        """Return the products of the rows of all matrices with their vectors, (n_vectors, n_rows)."""
        for i, rows in enumerate(matrices):
            self.project(i, rows)
        n_vectors, n_cols = self.vectors.shape
        n_rows = matrices[0].size // n_cols
        return self._products[: n_vectors * n_rows].reshape(n_vectors, n_rows)

    def sum_of_rows(self, own: Float32) -> LargeSum:
        """Return a new sum for `add`, of (rank, n_cols) float32, which may lie in a worker's own memory."""
        return self._stream.group.large_sum(own)

    def add(self, total: LargeSum, block: Block, found: Float32, rows: Float32) -> None:
        """Add to a sum the products of a block with its rows of any matrix: `total += found @ rows`."""
        table = rows.reshape(-1, self.vectors.shape[1])
        total.add_by(
            block.number, lambda out: products.add_product(found, table, self._scratch[:4], out)
        )

    def add_gram(self, total: RowSum, block: Block, found: Float32) -> None:
        """Add the Gram matrix of a block's products, (q, n_rows), to a sum of (q, q) float64."""
        by_rows = self.transposed(found)
        total.add_by(block.number, lambda out: products.add_gram(by_rows, out))

    def survey(self, matrices: Callable[[Block], Sequence[Float32] | Float32]) -> Float64:
        """Return the Gram matrix of the products of all matrices with their vectors, (n_vectors, n_vectors).

        One pass; `matrices` is as of `find`.
        """
        n_vectors = len(self.vectors)
        grams = self._stream.group.row_sum((n_vectors, n_vectors))
        for block in self._stream.blocks():
            self.add_gram(grams, block, self.project_all(matrices(block)))
        return grams.total()

    def take_off(self, found: Float32, vectors: Float32, rows: Float32) -> None:
        """Take from rows, (n_rows * n_cols,), their part along vectors, by the products with these."""
        part = self.transposed(found)
        np.negative(part, out=part)
        self.add_vectors(vectors, part, rows)

    def transposed(self, found: Float32) -> Float32:
        """Return products, (q, n_rows), as (n_rows, q); overwritten by the next."""
        by_rows = self._by_rows[: found.size].reshape(found.shape[::-1])
        by_rows[:] = found.T
        return by_rows

    def add_vectors(self, vectors: Float32, factors: Float32, rows: Float32) -> None:
        """Add multiples of vectors to rows: `rows += factors @ vectors`.

        Parameters
        ----------
        vectors : (q, n_cols) float32
            All, or those of a matrix.
        factors : (n_rows, q) float32
            For each row and vector.
        rows : (n_rows * n_cols,) float32
            Added to.
        """
        table = rows.reshape(-1, vectors.shape[1])
        products.add_product(factors, vectors, self._scratch[:4], table)

    def multiply(self, left: Float32, right: Float32, out: Float32) -> None:
        """Write `left @ right`."""
        out[:] = 0
        products.add_product(left, right, self._scratch[:4], out)

    def mix(self, found: Float32, mixing: Float64) -> Float32:
        """Return products, (q, n_rows), times a matrix as (n_rows, q), which lies in the products' place."""
        by_rows, mixed = self.transposed(found), found.reshape(found.shape[::-1])
        self.multiply(by_rows, mixing.astype(np.float32), mixed)
        return mixed

    def turn(self, rotation: Float64, matrix: Float32) -> None:
        """Replace the rows of a matrix, (rank, n_cols), by `rotation @ matrix`."""
        turned = self._turned[: len(matrix)]
        self.multiply(rotation.astype(np.float32), matrix, turned)
        matrix[:] = turned


def multiply(*factors: Float64) -> Float64:
    """Return the product of small matrices, from the left one on."""
    first, *others = factors
    for other in others:
        out = np.empty((len(first), other.shape[1]))
        small.multiply(np.ascontiguousarray(first), np.ascontiguousarray(other), out)
        first = out
    return first


def eigenvectors(gram: Float64) -> tuple[Float64, Float64]:
    """Return eigenvalues of a Gram matrix, the largest first, and eigenvectors as rows.

    Parameters
    ----------
    gram : (n, n) float64
        Symmetric, without negative eigenvalues but for rounding.

    Returns
    -------
    values : (n,) float64
        0 where nothing but rounding is left.
    vectors : (n, n) float64
        Orthonormal rows.
    """
    matrix, vectors = gram.copy(), np.empty_like(gram)
    small.decompose(matrix, vectors)
    values = np.diagonal(matrix)
    order = np.argsort(-values, kind="stable")
    values = values[order]
    return np.where(values > NOTHING * values[0], values, 0.0), vectors[order]


def direction_memory(job: TensorJob, ranks: Sequence[int]) -> WorkingMemory:
    """Count the bytes of `Directions`."""
    ranks = [min(rank, job.out.n_rows, job.n_cols) for rank in ranks]
    n_vectors = sum(ranks)
    fixed = 4 * job.n_cols * (2 * n_vectors + max(ranks)) + 4 * SCRATCH_SHAPE[0] * SCRATCH_SHAPE[1]
    fixed += 8 * SUM_LANES + 8 * 8 * n_vectors**2  # Gram matrices, their roots and products
    return WorkingMemory(fixed, 2 * 4 * n_vectors)


def _fill_first(vectors: Float32) -> None:
    """Write the vectors that a search begins with, (rank, n_cols): random ones, or those of a base."""
    rank, n_cols = vectors.shape
    if rank == n_cols:
        vectors[:] = 0
        np.fill_diagonal(vectors, 1)
        return
    values = vectors.reshape(-1)
    for start in range(0, values.size, SIGNS):
        part = values[start : start + SIGNS]
        part[:] = _random_signs(start, part.size)


def _random_signs(first: int, n: int) -> Float32:
    """Return numbers of a series of 1 and -1, the same with every version of NumPy (splitmix64)."""
    x = np.arange(first + 1, first + n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    signs = (x >> np.uint64(63)).astype(np.float32)
    return np.float32(1) - np.float32(2) * signs
