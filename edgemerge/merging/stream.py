"""One worker on one tensor: rows from every input through an arena, merged, encoded, written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.reordering import Permutations, find_reorderings
from edgemerge.budget import Arena
from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.mixture import MixtureSource
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.finite import find_non_finite
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.formats.quants.weighted import WEIGHTED_SCRATCH
from edgemerge.merging.input_rows import find_on_base
from edgemerge.merging.soundness import say_damaged, say_undefined
from edgemerge.merging.token_rows import TokenRowReader
from edgemerge.merging.traffic import PartResult, Traffic
from edgemerge.methods.blocks import NON_FINITE, Block, least_overflow
from edgemerge.methods.shared_tensor import GroupThread
from edgemerge.methods.table import METHODS
from edgemerge.native import KernelFile
from edgemerge.output.checksums import RowChecksum
from edgemerge.output.places import RowWriter
from edgemerge.token_rows import ZERO, Run
from edgemerge.types import SUMS, Float32, Float64, InputTensor, Plan, Source, TensorJob, UInt8

__all__ = ["TensorStream"]

linear, norms = KernelFile("linear"), KernelFile("norms")

# Pages are dropped from the page cache while a tensor is read, not after it. The system then reads the next
# pages into the same memory. On a virtual machine this halves the processor time of reading.
FORGET_BYTES = 8 << 20


class TensorStream:
    """One worker's view of a tensor: implements `blocks.BlockStream` over sources and an arena.

    Example: a tensor of 6 rows, `rows_per_block` 2 and `cached_blocks` 1, made by one worker. There are
    blocks 0, 1 and 2, and two places in the arena. In the first pass block 0 is loaded into place 0 and
    stays. Block 1 is loaded into place 1, and block 2 over it. In the second pass blocks 1 and 2 are read
    and decoded again in place 1. So 6 + 4 rows are read. With `cached_blocks` 3 every row is read once.

    Parameters
    ----------
    job : TensorJob
        The tensor.
    sources : sequence of Source
        The open models, as `Plan.models` lists them.
    arena : Arena
        The worker's memory. It is reset first; its arrays live as long as the stream.
    the_plan : Plan
        Gives the seed and what is aligned.
    traffic : Traffic
        Counts bytes, and stops the worker.
    permutations : Permutations
        How heads and neurons of the layers are permuted.
    matrices : mapping of Path to ImportanceMatrix
        Open; those that the plan uses.
    group : GroupThread
        The worker's place in the thread group of the rows.
    rows : (int, int)
        First row, and last + 1, that the group makes. A method with sums over the tensor makes all.
    """

    def __init__(
        self,
        job: TensorJob,
        sources: Sequence[Source],
        arena: Arena,
        the_plan: Plan,
        traffic: Traffic,
        permutations: Permutations,
        matrices: Mapping[Path, ImportanceMatrix],
        group: GroupThread,
        rows: tuple[int, int],
    ) -> None:
        self.job = job
        self.seed = the_plan.recipe.seed
        self.group = group
        self.layer_sum: Float64 | None = None
        self._inputs = job.inputs  # which a job makes anew at each call
        self.part = PartResult(tuple(RowChecksum() for _ in self._inputs), RowChecksum())
        self._range = rows
        self._sources = sources
        self._arena = arena
        self._traffic = traffic
        self._matrices = matrices
        self._quantiser = the_plan.recipe.imatrix
        self._matrix = -1  # number of the matrix whose importances are in the arena, or -1
        self._cached: dict[int, Block] = {}  # block number -> block, which stays in the arena
        self._is_first_pass = True  # only this pass adds to the checksums of the inputs
        self._gives_back = job.passes == 1  # drop pages that are not read again
        self._base_rows: Float32 | None = None  # of the block that is filled
        self._forgotten = [0] * len(self._inputs)  # rows whose pages were dropped, for each input
        arena.reset()
        height = max(1, job.rows_per_block)
        # A TensorSpec computes its row bytes at each call. Keep them, as every block needs them.
        self._row_bytes = [tensor.spec.row_bytes for tensor in self._inputs]
        self._out_row_bytes = job.out.row_bytes
        widest = max(*self._row_bytes, self._out_row_bytes)
        self._raw = self.take((height * widest,), np.uint8).view(np.uint8)
        if not job.is_byte_copy:
            method = METHODS[job.method]
            self._takes_deltas = method.takes_deltas(job)
            # Otherwise a task vector or the result shows that an input is not finite.
            self._checks_inputs = not (self._takes_deltas or method.keeps_non_finite(job))
            n = height * job.out.n_cols
            # Block by block, and in each block all inputs, so that what is used together lies together.
            self._n_places = min(job.n_blocks, job.cached_blocks + 1)
            self._values = self.take((self._n_places, len(self._inputs) * n), np.float32)
            self._n_overflows = np.zeros(1, np.int64)
            scratch = WEIGHTED_SCRATCH if job.is_weighted else CODECS[job.out.dtype].scratch_len
            self._scratch = self.take((scratch,), np.float32).view(np.float32)
            columns = job.out.n_cols if job.is_weighted else 0
            self._weights = self.take((columns,), np.float32).view(np.float32)
            self._token_rows = (
                None if job.rows is None else TokenRowReader(job, self.take, self._decode_stored)
            )
            self._reorderings = find_reorderings(
                permutations, self._inputs, soft=the_plan.align == "soft"
            )
            self._on_base = find_on_base(job, sources, self._reorderings)
            self._as_base = {
                i for i, s in self._on_base.items() if not s.changes(self._inputs[i].spec.name)
            }
            read = [0 if i in self._as_base else i for i in range(len(self._inputs))]
            self.part = PartResult(tuple(self.part.inputs[i] for i in read), self.part.output)
            # Working memory to permute columns, a row; and to sum rows, another block.
            columns = job.out.n_cols if the_plan.reorders else 0
            self._row = self.take((columns,), np.float32).view(np.float32)
            spare = n if the_plan.align in SUMS else 0
            self._spare = self.take((spare,), np.float32).view(np.float32)

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        """Return uninitialised memory from the arena."""
        return self._arena.take(shape, dtype)

    def read_importances(self, k: int, out_f32: Float32) -> None:
        """Fill (n_matrices, n_cols) with the importances of an expert's columns, in the output's order."""
        tensor = self.job.experts[k]
        assert tensor.imatrix is not None
        for matrix, values in enumerate(out_f32):
            self._matrices[tensor.imatrix].read(tensor.spec.name, matrix * values.size, values)
        reordering = self._reorderings.get(k + len(self._inputs) - len(self.job.experts))
        if reordering is not None:
            reordering.order_importances(self._row, out_f32.reshape(-1))

    def measure(self) -> Float64:
        """Return what the method measures of the tensor, to be summed over its layer."""
        measure = METHODS[self.job.method].measure
        assert measure is not None
        return measure(self)

    def run(self, writer: RowWriter, layer_sum: Float64 | None = None) -> PartResult:
        """Make this worker's blocks of the tensor, and write them.

        Parameters
        ----------
        writer : RowWriter
            Takes the rows.
        layer_sum : array of float64, optional
            What `measure` returned, summed over the tensor's layer, where the method asks for it.
        """
        if self.job.is_byte_copy:
            self._copy(writer)
        else:
            self.layer_sum = layer_sum
            self._merge(writer)
        if self.group.finish():
            for tensor in self._inputs:
                self._sources[tensor.model].check_unchanged()
                self._sources[tensor.model].forget(tensor.spec.name)
        return self.part

    def _copy(self, writer: RowWriter) -> None:
        for _, start, stop in self._ranges():
            raw = self._raw[: (stop - start) * self._out_row_bytes]
            runs = [Run(start, stop, 0, start)]
            if self.job.rows is not None:
                runs = list(self.job.rows.runs(0, start, stop))
            for run in runs:
                n_rows, at = run.stop - run.start, (run.start - start) * self._out_row_bytes
                copied = raw[at : at + n_rows * self._out_row_bytes]
                if run.donor == ZERO:
                    copied[:] = 0  # which every type decodes to zeros
                    continue
                self._read(0, run.row, run.row + n_rows, run.start, copied)
                self._check_copy(self.job.experts[0], copied, run.row)
            self._write(writer, start, stop - start, raw)

    def _check_copy(self, tensor: InputTensor, raw: UInt8, first_row: int) -> None:
        """Refuse NaN and infinity, as decoding does."""
        bad = find_non_finite(raw, tensor.spec.dtype)
        if bad is not None:
            raise self._damaged(tensor, "NaN or infinity", first_row * tensor.spec.n_cols + bad)

    def _damaged(self, tensor: InputTensor, what: str, index: int) -> FormatError:
        """Make the error for a number that is none; of a mixture it names the expert's file."""
        source, name = self._sources[tensor.model], tensor.spec.name
        if isinstance(source, MixtureSource):
            source, name, index = source.locate(name, index)
        return say_damaged(source.path, name, what, index)

    def _merge(self, writer: RowWriter) -> None:
        codec = CODECS[self.job.out.dtype]
        for block, values in METHODS[self.job.method].blocks(self):
            self._check_range(block, values)
            row = block.first // block.n_cols
            if self.job.change is not None:
                self._undo(values.reshape(-1, block.n_cols), row)
            raw = self._raw[: block.n_rows * self._out_row_bytes]
            if self.job.is_weighted:
                self._encode_weighted(values, raw, row)
            else:
                codec.encode(values, raw, self._scratch)
            self._write(writer, row, block.n_rows, raw)

    def _undo(self, rows: NDArray[np.float32], row: int) -> None:
        """Make values those that a directory has."""
        assert self.job.change is not None
        self.job.change.undo(rows, row)
        if _count_overflows(rows.reshape(-1), least_overflow(self.job.out.dtype)):
            raise MismatchError(
                f"the merged tensor {self.job.out.name!r} has values that a directory cannot have; write "
                "a GGUF, or use --type BF16 or F32",
                tensor=self.job.out.name,
            )

    def _encode_weighted(self, values: Float32, raw: UInt8, first_row: int) -> None:
        """Encode rows. Each matrix of a stack of experts has importances of its own."""
        out = self.job.out
        assert self._quantiser is not None
        n_rows, at = raw.size // out.row_bytes, 0
        while at < n_rows:
            matrix, row = divmod(first_row + at, out.shape[-2])
            if matrix != self._matrix:
                self._matrices[self._quantiser].read(out.name, matrix * out.n_cols, self._weights)
                self._matrix = matrix
            stop = min(n_rows, at + out.shape[-2] - row)
            CODECS[out.dtype].encode(
                values[at * out.n_cols : stop * out.n_cols],
                raw[at * out.row_bytes : stop * out.row_bytes],
                self._scratch,
                self._weights,
            )
            at = stop

    def _write(self, writer: RowWriter, start: int, n_rows: int, raw: UInt8) -> None:
        writer.write_rows(start, raw)
        self.part.output.add(start, n_rows, raw)
        self._traffic.add(0, raw.nbytes)

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, first row and last + 1 of this worker's blocks."""
        (first, end), height = self._range, self.job.rows_per_block
        for number in self.group.take_blocks():
            start = first + number * height
            yield number, start, min(start + height, end)

    def blocks(self) -> Iterator[Block]:
        """Yield this worker's blocks in row order. Cached blocks are not loaded again."""
        for number, start, stop in self._ranges():
            block = self._cached.get(number)
            if block is None:
                is_cached = len(self._cached) < self.job.cached_blocks
                self._gives_back = is_cached or self.job.passes == 1
                block = self._load(number, start, stop)
                if is_cached:
                    self._cached[number] = block
            yield block
        self._is_first_pass = False

    def sample(self, n_rows: int) -> Iterator[Block]:
        """Yield rows, evenly spaced over the tensor, as blocks of one; before the first pass."""
        self._is_first_pass = self._gives_back = False  # checksums and pages are those of passes
        total = self.job.out.n_rows
        count = min(n_rows, total)
        for row in (i * total // count for i in range(count)):
            yield self._load(0, row, row + 1)
        self._is_first_pass = True

    def _load(self, number: int, start: int, stop: int) -> Block:
        """Load rows into the next free place, or into the last, which all uncached blocks use."""
        job = self.job
        n = (stop - start) * job.out.n_cols
        place = self._values[min(len(self._cached), self._n_places - 1)]
        values = place[: len(self._inputs) * n].reshape(len(self._inputs), n).view(np.float32)
        base, experts = (values[0], values[1:]) if job.base else (None, values)
        block = Block(number, start * job.out.n_cols, job.out.n_cols, base, experts)
        self._fill(block, start, stop)
        return block

    def _fill(self, block: Block, start: int, stop: int) -> None:
        """Decode all inputs of a block. Make task vectors of experts where the method takes them."""
        job = self.job
        self._base_rows = None
        if job.base is not None and block.base is not None:
            self._decode(0, start, stop, start, block.base)
            self._base_rows = block.base
        first = 0 if job.base is None else 1
        for i, values in enumerate(block.experts, first):
            self._load_expert(i, start, stop, values)
            if self._takes_deltas:
                linear.subtract(block.base, values, self._n_overflows)
                if self._n_overflows[0] and not self._checks_inputs:
                    self._check_inputs(block)

    def _check_inputs(self, block: Block) -> None:
        """Load a block again and check each input. Raises FormatError where one is not finite."""
        first, was_first_pass = block.first // block.n_cols, self._is_first_pass
        self._checks_inputs = True
        self._is_first_pass = False  # the checksums have these rows already
        self._fill(block, first, first + block.n_rows)
        self._checks_inputs = False
        self._is_first_pass = was_first_pass

    def _load_expert(self, i_input: int, start: int, stop: int, out_f32: Float32) -> None:
        """Decode rows [start, stop) in the reference's order."""
        reordering = self._reorderings.get(i_input)
        if reordering is None:
            self._decode(i_input, start, stop, start, out_f32)
            return

        def decode(first: int, last: int, at: int | None, values: Float32) -> None:
            self._decode(i_input, first, last, at, values)

        reordering.load(start, stop, decode, self._row, self._spare, out_f32)

    def _decode(
        self, i_input: int, start: int, stop: int, at: int | None, out_f32: Float32
    ) -> None:
        """Decode rows [start, stop) of an input, of a tensor of tokens those for the output's tokens."""
        if self._token_rows is None:
            self._decode_stored(i_input, start, stop, at, out_f32)
        else:
            self._token_rows.decode(i_input, start, stop, out_f32)

    def _decode_stored(
        self, i_input: int, start: int, stop: int, at: int | None, out_f32: Float32
    ) -> None:
        tensor = self._inputs[i_input]
        raw = self._raw[: (stop - start) * self._row_bytes[i_input]]
        if self._base_rows is not None and i_input in self._as_base:
            out_f32[:] = self._base_rows
            self._traffic.add(raw.nbytes, 0)
            return
        self._read(i_input, start, stop, at, raw)
        CODECS[tensor.spec.dtype].decode(raw, out_f32)
        if self._checks_inputs and _count_overflows(out_f32, NON_FINITE):
            bad = int(np.flatnonzero(~np.isfinite(out_f32))[0])
            raise self._damaged(tensor, str(out_f32[bad]), start * tensor.spec.n_cols + bad)

    def _read(self, i_input: int, start: int, stop: int, at: int | None, raw: UInt8) -> None:
        """Read stored rows, which become the output's rows from `at` on; None: a part of a sum."""
        tensor = self._inputs[i_input]
        if self._base_rows is not None and (adapted := self._on_base.get(i_input)):
            adapted.read_on_base(tensor.spec.name, start, stop, self._base_rows, raw)
        else:
            self._sources[tensor.model].read_rows(tensor.spec.name, start, stop, raw)
        self._traffic.add(raw.nbytes, 0)
        if at is not None and self._is_first_pass:
            self.part.inputs[i_input].add(at, stop - start, raw)
        if at == start and self._gives_back:  # in order, and not again
            self._give_back(tensor, i_input, stop)

    def _give_back(self, tensor: InputTensor, i_input: int, n_rows: int) -> None:
        if (n_rows - self._forgotten[i_input]) * self._row_bytes[i_input] >= FORGET_BYTES:
            self._sources[tensor.model].forget(tensor.spec.name, n_rows)
            self._forgotten[i_input] = n_rows

    def _check_range(self, block: Block, values: Float32) -> None:
        """Raise MismatchError where the output type cannot hold a result, which would be infinite."""
        dtype = self.job.out.dtype
        n_overflows = block.n_overflows
        if n_overflows is None:
            n_overflows = _count_overflows(values, least_overflow(dtype))
        if n_overflows:
            largest = float(np.abs(values).max())
            if not self._checks_inputs:  # an input may be the cause, and is then named
                self._check_inputs(block)
            if np.isnan(largest) and not (self._takes_deltas and self._n_overflows[0]):
                raise say_undefined(self.job)
            raise MismatchError(
                f"the merged tensor {self.job.out.name!r} reaches {largest:g}, "
                f"which {dtype} cannot hold; use --type BF16 or F32, or smaller weights",
                tensor=self.job.out.name,
            )


def _count_overflows(values: Float32, limit: int) -> int:
    count = np.zeros(1, np.int64)
    norms.count_overflows(values, limit, count)
    return int(count[0])
