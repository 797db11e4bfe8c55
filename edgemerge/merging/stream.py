"""One worker on one tensor: rows from every input through an arena, merged, encoded, written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.neurons import NeuronPlan
from edgemerge.alignment.reordering import Frame, find_frame, find_neuron_frame
from edgemerge.budget import Arena
from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.finite import find_non_finite
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.formats.quants.weighted import WEIGHTED_SCRATCH
from edgemerge.methods.arithmetic import merged_blocks
from edgemerge.methods.blocks import NON_FINITE, Block, least_beyond
from edgemerge.methods.hierarchical import survey_gram
from edgemerge.methods.shared_tensor import Member, Stopped
from edgemerge.methods.table import METHODS, is_plain_sum, keeps_non_finite
from edgemerge.native import KernelFile
from edgemerge.output.checksums import RowChecksum, TensorResult, join_checksums
from edgemerge.output.file import OutputFile
from edgemerge.types import Float32, Float64, HeadPlan, InputTensor, Plan, Source, TensorJob, UInt8

__all__ = ["Moves", "Share", "TensorStream", "Traffic", "join_shares"]

linear, norms = KernelFile("linear"), KernelFile("norms")

# (reference, model, layer of the reference, layer of the model) -> where heads and neurons belong
Moves: TypeAlias = dict[tuple[int, int, int, int], list[HeadPlan | NeuronPlan]]

# Pages that were read are given back while a tensor is read, not after it: the system then reads the next
# ones into the same memory, which saves half of the processor's time for reading where memory is virtual.
FORGET_BYTES = 8 << 20


class Traffic:
    """Bytes read and written so far, by all workers, and the sign to stop."""

    def __init__(self) -> None:
        self.read = 0
        self.written = 0
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def add(self, n_read: int, n_written: int) -> None:
        """Count, and give up where somebody asked for it."""
        with self._lock:
            self.read += n_read
            self.written += n_written
        if self.stop.is_set():
            raise Stopped


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker read of each input, and wrote."""

    inputs: tuple[RowChecksum, ...]
    output: RowChecksum


def join_shares(shares: Sequence[Share]) -> TensorResult:
    """Put together what the workers of one tensor did."""
    inputs = zip(*(share.inputs for share in shares), strict=True)
    return TensorResult(
        tuple(map(join_checksums, inputs)), join_checksums([share.output for share in shares])
    )


class TensorStream:
    """Implements `blocks.BlockStream` over sources and an arena, for one worker of a tensor's team."""

    def __init__(
        self,
        job: TensorJob,
        sources: Sequence[Source],
        arena: Arena,
        the_plan: Plan,
        traffic: Traffic,
        moves: Moves,
        importance: ImportanceMatrix | None,
        team: Member,
    ) -> None:
        self.job = job
        self.seed = the_plan.recipe.seed
        self.team = team
        self.share = Share(tuple(RowChecksum() for _ in job.inputs), RowChecksum())
        self._sources = sources
        self._arena = arena
        self._traffic = traffic
        self._importance = importance
        self._matrix = -1  # number of the matrix whose importances are in the arena; -1: none
        self._held: dict[int, Block] = {}  # by number; they stay in the arena
        self._is_first_pass = True  # which alone is in the checksums
        self._gives_back = job.passes == 1  # pages of what was read, as it is not read again
        self._forgotten = [0] * len(job.inputs)  # rows whose pages were given back
        arena.reset()
        rows = max(1, job.rows_per_block)
        # Of a specification they are computed anew each time, which every block would pay for.
        self._row_bytes = [tensor.spec.row_bytes for tensor in job.inputs]
        self._out_row_bytes = job.out.row_bytes
        widest = max(*self._row_bytes, self._out_row_bytes)
        self._raw = self.take((rows * widest,), np.uint8).view(np.uint8)
        if not job.is_byte_copy:
            self._on_deltas = METHODS[job.method].on_deltas and not is_plain_sum(job)
            # Else task vectors say it, or the result alone.
            self._checks_inputs = not (self._on_deltas or keeps_non_finite(job))
            n = rows * job.out.n_cols
            # One block after the other, and in each all inputs: what is worked on at a time lies together.
            self._n_places = min(job.n_blocks, job.held_blocks + 1)
            self._values = self.take((self._n_places, len(job.inputs) * n), np.float32)
            self._n_beyond = np.zeros(1, np.int64)
            scratch = WEIGHTED_SCRATCH if job.is_weighted else CODECS[job.out.dtype].scratch_len
            self._scratch = self.take((scratch,), np.float32).view(np.float32)
            columns = job.out.n_cols if job.is_weighted else 0
            self._weights = self.take((columns,), np.float32).view(np.float32)
            self._frames = self._find_frames(moves, soft=the_plan.align == "soft")
            # Working memory for moving heads: a row, and for summing them another block.
            aligns = the_plan.align != "off" or the_plan.recipe.neurons
            self._row = self.take((job.out.n_cols if aligns else 0,), np.float32).view(np.float32)
            spare = n if the_plan.align == "soft" else 0
            self._spare = self.take((spare,), np.float32).view(np.float32)

    def _find_frames(self, moves: Moves, *, soft: bool) -> dict[int, Frame]:
        """Find the inputs that are read in the reference's frame: input number -> frame."""
        frames: dict[int, Frame] = {}
        first = self.job.inputs[0]
        reference = layer_index(first.spec.name)
        for i, tensor in enumerate(self.job.inputs):
            layer = layer_index(tensor.spec.name)
            if reference is None or layer is None:
                continue
            for plan in moves.get((first.model, tensor.model, reference, layer), ()):
                if isinstance(plan, HeadPlan):
                    frame = find_frame(plan, tensor.spec.name, soft=soft)
                else:
                    frame = find_neuron_frame(plan, tensor.spec.name, tensor.spec.n_rows)
                if frame is not None:
                    frames[i] = frame
        return frames

    def take(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        """Return memory from the arena, its contents whatever was there."""
        return self._arena.take(shape, dtype)

    def measure(self) -> Float64:
        """Return the Gram matrix of the tensor's task vectors, (n_experts, n_experts)."""
        return survey_gram(self)

    def run(self, output: OutputFile, offset: int, shared_gram: Float64 | None = None) -> Share:
        """Make this worker's blocks of the tensor, which lies at `offset` of the output file.

        Parameters
        ----------
        output : OutputFile
            Where to.
        offset : int
            Position of the tensor's first byte.
        shared_gram : (n_experts, n_experts) float64, optional
            Of the tensor's whole layer, where the method weights by layer.
        """
        if self.job.is_byte_copy:
            self._copy(output, offset)
        else:
            self._merge(output, offset, shared_gram)
        if self.team.finish():
            for tensor in self.job.inputs:
                self._sources[tensor.model].check_unchanged()
                self._sources[tensor.model].forget(tensor.spec.name)
        return self.share

    def _copy(self, output: OutputFile, offset: int) -> None:
        tensor = self.job.experts[0]
        for _, start, stop in self._ranges():
            raw = self._read(tensor, 0, start, stop, start)
            self._check_copy(tensor, raw, start)
            self._write(output, offset, start, stop - start, raw)

    def _check_copy(self, tensor: InputTensor, raw: UInt8, first_row: int) -> None:
        """Refuse NaN and infinity, as decoding does."""
        bad = find_non_finite(raw, tensor.spec.dtype)
        if bad is not None:
            raise FormatError(
                f"holds NaN or infinity at index {first_row * tensor.spec.n_cols + bad}; "
                "that model is damaged, get it again",
                path=self._sources[tensor.model].path,
                tensor=tensor.spec.name,
            )

    def _merge(self, output: OutputFile, offset: int, shared_gram: Float64 | None) -> None:
        codec = CODECS[self.job.out.dtype]
        for block, values in merged_blocks(self, shared_gram):
            self._check_range(block, values)
            raw = self._raw[: block.n_rows * self._out_row_bytes]
            row = block.first // block.n_cols
            if self.job.is_weighted:
                self._encode_weighted(values, raw, row)
            else:
                codec.encode(values, raw, self._scratch)
            self._write(output, offset, row, block.n_rows, raw)

    def _encode_weighted(self, values: Float32, raw: UInt8, first_row: int) -> None:
        """Encode rows; each expert of a stack has importances of its own."""
        out, importance = self.job.out, self._importance
        assert importance is not None
        n_rows, at = raw.size // out.row_bytes, 0
        while at < n_rows:
            matrix, row = divmod(first_row + at, out.shape[-2])
            if matrix != self._matrix:
                importance.read(out.name, matrix * out.n_cols, self._weights)
                self._matrix = matrix
            stop = min(n_rows, at + out.shape[-2] - row)
            CODECS[out.dtype].encode(
                values[at * out.n_cols : stop * out.n_cols],
                raw[at * out.row_bytes : stop * out.row_bytes],
                self._scratch,
                self._weights,
            )
            at = stop

    def _write(self, output: OutputFile, offset: int, start: int, n_rows: int, raw: UInt8) -> None:
        output.write(raw, offset + start * self._out_row_bytes)
        self.share.output.add(start, n_rows, raw)
        self._traffic.add(0, raw.nbytes)

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, first row and last + 1 of this worker's blocks."""
        n_rows, height = self.job.out.n_rows, self.job.rows_per_block
        for number in self.team.take_blocks():
            yield number, number * height, min((number + 1) * height, n_rows)

    def blocks(self) -> Iterator[Block]:
        """Yield this worker's blocks in row order; those that are held are not loaded again."""
        for number, start, stop in self._ranges():
            block = self._held.get(number)
            if block is None:
                is_held = len(self._held) < self.job.held_blocks
                self._gives_back = is_held or self.job.passes == 1
                block = self._load(number, start, stop)
                if is_held:
                    self._held[number] = block
            yield block
        self._is_first_pass = False

    def _load(self, number: int, start: int, stop: int) -> Block:
        """Load rows into the next free place, or the last, through which pass all that are not held."""
        job = self.job
        n = (stop - start) * job.out.n_cols
        place = self._values[min(len(self._held), self._n_places - 1)]
        values = place[: len(job.inputs) * n].reshape(len(job.inputs), n).view(np.float32)
        base, experts = (values[0], values[1:]) if job.base else (None, values)
        block = Block(number, start * job.out.n_cols, job.out.n_cols, base, experts)
        self._fill(block, start, stop)
        return block

    def _fill(self, block: Block, start: int, stop: int) -> None:
        """Decode all inputs of a block; experts as task vectors where the method keeps them."""
        job = self.job
        if job.base is not None and block.base is not None:
            self._decode(job.base, 0, start, stop, start, block.base)
        first = 0 if job.base is None else 1
        for i, (tensor, values) in enumerate(zip(job.experts, block.experts, strict=True), first):
            self._load_expert(tensor, i, start, stop, values)
            if self._on_deltas:
                linear.subtract(block.base, values, self._n_beyond)
                if self._n_beyond[0] and not self._checks_inputs:
                    self._check_inputs(block)

    def _check_inputs(self, block: Block) -> None:
        """Load a block again and look at each input; raise FormatError where one is not finite."""
        first, was_first_pass = block.first // block.n_cols, self._is_first_pass
        self._checks_inputs = True
        self._is_first_pass = False  # what it reads is in the checksums already
        self._fill(block, first, first + block.n_rows)
        self._checks_inputs = False
        self._is_first_pass = was_first_pass

    def _load_expert(
        self, tensor: InputTensor, i_input: int, start: int, stop: int, out_f32: Float32
    ) -> None:
        """Decode rows [start, stop) of the reference's frame."""
        frame = self._frames.get(i_input)
        if frame is None:
            self._decode(tensor, i_input, start, stop, start, out_f32)
            return

        def decode(first: int, last: int, at: int | None, values: Float32) -> None:
            self._decode(tensor, i_input, first, last, at, values)

        frame.load(start, stop, decode, self._row, self._spare, out_f32)

    def _decode(
        self,
        tensor: InputTensor,
        i_input: int,
        start: int,
        stop: int,
        at: int | None,
        out_f32: Float32,
    ) -> None:
        raw = self._read(tensor, i_input, start, stop, at)
        CODECS[tensor.spec.dtype].decode(raw, out_f32)
        if self._checks_inputs and _count_beyond(out_f32, NON_FINITE):
            bad = int(np.flatnonzero(~np.isfinite(out_f32))[0])
            raise FormatError(
                f"holds {out_f32[bad]} at index {start * tensor.spec.n_cols + bad}; "
                "that model is damaged, get it again",
                path=self._sources[tensor.model].path,
                tensor=tensor.spec.name,
            )

    def _read(
        self, tensor: InputTensor, i_input: int, start: int, stop: int, at: int | None
    ) -> UInt8:
        """Read stored rows, which will be rows from `at` on of the output; None: a part of some."""
        raw = self._raw[: (stop - start) * self._row_bytes[i_input]]
        self._sources[tensor.model].read_rows(tensor.spec.name, start, stop, raw)
        self._traffic.add(raw.nbytes, 0)
        if at is not None and self._is_first_pass:
            self.share.inputs[i_input].add(at, stop - start, raw)
        if at == start and self._gives_back:  # in order, and not again
            self._give_back(tensor, i_input, stop)
        return raw

    def _give_back(self, tensor: InputTensor, i_input: int, n_rows: int) -> None:
        if (n_rows - self._forgotten[i_input]) * self._row_bytes[i_input] >= FORGET_BYTES:
            self._sources[tensor.model].forget(tensor.spec.name, n_rows)
            self._forgotten[i_input] = n_rows

    def _check_range(self, block: Block, values: Float32) -> None:
        """Refuse a result that the output type cannot hold: never a silent infinity."""
        dtype = self.job.out.dtype
        n_beyond = block.n_beyond
        if n_beyond is None:
            n_beyond = _count_beyond(values, least_beyond(dtype))
        if n_beyond:
            largest = float(np.abs(values).max())
            if not self._checks_inputs:  # whose fault is it?
                self._check_inputs(block)
            raise MismatchError(
                f"the merged tensor {self.job.out.name!r} reaches {largest:g}, "
                f"which {dtype} cannot hold; use --type BF16 or F32, or smaller weights",
                tensor=self.job.out.name,
            )


def _count_beyond(values: Float32, limit: int) -> int:
    count = np.zeros(1, np.int64)
    norms.count_beyond(values, limit, count)
    return int(count[0])
