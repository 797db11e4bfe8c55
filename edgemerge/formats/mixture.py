"""A mixture of experts, put together from dense models while it is read.

Attention, norms and embeddings are the base's. The feed-forward matrices of all experts follow each other in
one tensor, as llama.cpp has them. Nothing is copied ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from edgemerge.errors import MismatchError
from edgemerge.experts import MIXTURE_PATH, Mixture
from edgemerge.formats import open_model
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.gates import EMBEDDING, Gates, make_gates
from edgemerge.formats.gguf.metadata import encode_value, get_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.quants.codec import CODECS, find_codec
from edgemerge.types import FileState, Float32, Source, TensorSpec, UInt8

__all__ = ["MixtureSource", "open_mixture"]

GATE = "ffn_gate_inp.weight"
STACKED = {
    "ffn_gate.weight": "ffn_gate_exps.weight",
    "ffn_down.weight": "ffn_down_exps.weight",
    "ffn_up.weight": "ffn_up_exps.weight",
}
RESIDUAL = "ffn_down.weight"  # the matrix whose product the layer adds to its input
KEPT = ("ffn_norm.weight",)  # of the feed-forward layers, what stays the base's
# Architecture of dense models -> the mixture's, whose graph in llama.cpp normalises the chosen weights.
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3moe"}
PIECE = 1 << 16  # bytes of an expert's rows that are converted at a time; one row at least


@dataclass(frozen=True, slots=True)
class _Stack:
    """Where the rows of a tensor come from: `n_rows` of each source, one after the other."""

    name: str  # in each source
    sources: tuple[Source, ...]
    scales: tuple[float, ...]
    n_rows: int
    is_converted: bool  # to F32, as types differ or values are scaled


class MixtureSource:
    """A `Source` of dense models that become experts.

    Parameters
    ----------
    mixture : Mixture
        What becomes of what.
    sources : mapping of Path to Source
        All of its models, open; closed with the mixture.

    Raises
    ------
    MismatchError
        The models are of another architecture, or their layers are not alike.
    """

    path = MIXTURE_PATH

    def __init__(self, mixture: Mixture, sources: Mapping[Path, Source]) -> None:
        self.parts = tuple(sources.values())
        self._base = base = sources[mixture.base]
        self._mixture = mixture
        self._check_models()
        self.architecture = ARCHITECTURES[base.architecture]
        self._experts = tuple(sources[expert.path] for expert in mixture.experts)
        scales = (expert.residual_scale for expert in mixture.experts)
        self._scales = tuple(1.0 if scale is None else scale for scale in scales)
        self._specs: dict[str, TensorSpec] = {}
        self._stacks: dict[str, _Stack] = {}
        for spec in base.specs().values():
            self._add(spec)
        self.gates: Gates | None = None  # no gate can be read before there are some

    def _check_models(self) -> None:
        """Refuse what has feed-forward layers of another kind, or of other models."""
        for source in self.parts:
            for name in source.specs():
                stem = name.split(".", 2)[-1]
                if stem.startswith("ffn_") and stem not in (*STACKED, *KEPT):
                    raise MismatchError(
                        f"tensor {name!r} of {source.path} has no place in a mixture of experts; give "
                        "dense models as F16, BF16 or F32",
                        tensor=name,
                    )
            if (
                source.architecture not in ARCHITECTURES
                or source.architecture != self._base.architecture
            ):
                raise MismatchError(
                    f"{source.path} is a {source.architecture} model; a mixture is made of dense models of "
                    f"one architecture, {' or '.join(ARCHITECTURES)}"
                )

    def _add(self, spec: TensorSpec) -> None:
        """List a tensor of the base, or the stack that takes its place."""
        layer = layer_index(spec.name)
        stem = spec.name if layer is None else spec.name.split(".", 2)[2]
        if stem not in STACKED:
            self._specs[spec.name] = spec
            return
        gate, n_experts = f"blk.{layer}.{GATE}", len(self._experts)
        if gate not in self._specs:
            width = self._base.specs()[EMBEDDING].n_cols
            self._specs[gate] = TensorSpec(gate, (n_experts, width), "F32", 4 * n_experts * width)
        theirs = [self._find(source, spec) for source in self._experts]
        scales = self._scales if stem == RESIDUAL else (1.0,) * n_experts
        is_converted = len({one.dtype for one in theirs}) > 1 or set(scales) != {1.0}
        dtype = "F32" if is_converted else theirs[0].dtype
        nbytes = 4 * prod(spec.shape) if is_converted else theirs[0].nbytes
        name = f"blk.{layer}.{STACKED[stem]}"
        self._stacks[name] = _Stack(spec.name, self._experts, scales, spec.n_rows, is_converted)
        self._specs[name] = TensorSpec(name, (n_experts, *spec.shape), dtype, n_experts * nbytes)

    def _find(self, source: Source, wanted: TensorSpec) -> TensorSpec:
        found = source.specs().get(wanted.name)
        if found is None or found.shape != wanted.shape:
            shape = "is missing in" if found is None else f"is {list(found.shape)} in"
            raise MismatchError(
                f"tensor {wanted.name!r} {shape} {source.path} and {list(wanted.shape)} in "
                f"{self._base.path}; experts must have the shapes of the base",
                tensor=wanted.name,
            )
        find_codec(found)
        return found

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name: the base's, with stacks instead of its feed-forward matrices."""
        return self._specs

    def held_bytes(self) -> int:
        """Bytes that stay in memory: the files' metadata, as far as it was read, and the gates."""
        read = [p for p in self.parts if p is self._base or isinstance(p, GgufModel)]
        metadata = sum(len(value) for part in read for value in part.metadata().values())
        gates = sum(spec.nbytes for name, spec in self._specs.items() if name.endswith(GATE))
        return metadata + gates

    def work_bytes(self) -> int:
        """Bytes that each thread takes to read rows, beside those that it reads into."""
        return max(part.work_bytes() for part in self.parts)

    def metadata(self) -> Mapping[str, bytes]:
        """Return the base's keys under the mixture's architecture, and how many experts there are."""
        old, new = self._base.architecture, self.architecture
        kept = {
            f"{new}.{key.removeprefix(f'{old}.')}" if key.startswith(f"{old}.") else key: value
            for key, value in self._base.metadata().items()
            if key != "general.size_label"  # of a dense model
        }
        kept["general.architecture"] = encode_value(new, "str")
        kept[f"{new}.expert_count"] = encode_value(len(self._experts), "u32")
        kept[f"{new}.expert_used_count"] = encode_value(self._mixture.experts_per_token, "u32")
        length = get_value(kept, f"{new}.feed_forward_length")
        if new != old and isinstance(length, int):
            kept[f"{new}.expert_feed_forward_length"] = encode_value(length, "u32")
        return kept

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` ((stop - start) * row_bytes,) with rows [start, stop)."""
        if name.endswith(GATE):
            assert self.gates is not None
            rows = self.gates(layer_index(name) or 0)[start:stop]
            out_u8[:] = np.ascontiguousarray(rows, "<f4").view(np.uint8).reshape(-1)
            return
        stack = self._stacks.get(name)
        if stack is None:
            self._base.read_rows(name, start, stop, out_u8)
            return
        row_bytes, at = self._specs[name].row_bytes, start
        while at < stop:
            number, first = divmod(at, stack.n_rows)
            last = min(stack.n_rows, first + stop - at)
            out = out_u8[(at - start) * row_bytes : (at - start + last - first) * row_bytes]
            if stack.is_converted:
                _convert(stack, number, first, last, out.view("<f4"))
            else:
                stack.sources[number].read_rows(stack.name, first, last, out)
            at += last - first

    def all_gates(self) -> dict[int, Float32]:
        """Return the gates of each layer, (n_experts, width)."""
        assert self.gates is not None
        layers = [layer_index(name) or 0 for name in self._specs if name.endswith(GATE)]
        return {layer: self.gates(layer) for layer in layers}

    def locate(self, name: str, index: int) -> tuple[Source, str, int]:
        """Return the model that an element of a tensor is of, its tensor there and its index in that."""
        stack = self._stacks.get(name)
        if stack is None:
            return self._base, name, index
        number, index = divmod(index, stack.n_rows * self._specs[name].n_cols)
        return stack.sources[number], stack.name, index

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Drop a tensor's pages from the page cache; a hint."""
        stack = self._stacks.get(name)
        if stack is None:
            if name in self._base.specs():
                self._base.forget(name, n_rows)
            return
        left = self._specs[name].n_rows if n_rows is None else n_rows
        for source in stack.sources:
            if left > 0:
                source.forget(stack.name, min(left, stack.n_rows))
            left -= stack.n_rows

    def notes(self) -> Sequence[str]:
        """Say what the base's reader says; the others give their feed-forward matrices alone."""
        return self._base.notes()

    def states(self) -> Sequence[FileState]:
        """Return what all files were when they were opened."""
        return [state for source in self.parts for state in source.states()]

    def check_unchanged(self) -> None:
        """Raise FormatError where a file was written to since it was opened."""
        for source in self.parts:
            source.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        for source in self.parts:
            source.close()


def open_mixture(
    mixture: Mixture,
    seed: int,
    stack: ExitStack,
    *,
    runnable: Path | None = None,
    with_gates: bool = True,
) -> MixtureSource:
    """Open all models of a mixture; the stack closes them.

    Parameters
    ----------
    mixture : Mixture
        What becomes of what.
    seed : int
        Of random gates.
    stack : ExitStack
        Gets what closes the models.
    runnable : Path, optional
        The base as a GGUF file, where gates are made of what it computes and it is none itself.
    with_gates : bool
        Make the gates; without them no gate can be read.

    Raises
    ------
    EdgemergeError
        As of `open_model`, `MixtureSource` and `make_gates`.
    """
    sources: dict[Path, Source] = {}
    for path in mixture.models():
        sources[path] = open_model(path)
        stack.callback(sources[path].close)
    found = MixtureSource(mixture, sources)
    if with_gates:
        found.gates = make_gates(mixture, sources[mixture.base], seed, runnable or mixture.base)
    return found


def _convert(stack: _Stack, number: int, first: int, last: int, out_f32: Float32) -> None:
    """Decode rows of one expert, a few at a time, and scale them."""
    source, scale = stack.sources[number], np.float32(stack.scales[number])
    spec = source.specs()[stack.name]
    height = max(1, PIECE // spec.row_bytes)
    for row in range(first, last, height):
        stop = min(last, row + height)
        raw = np.empty((stop - row) * spec.row_bytes, np.uint8)
        source.read_rows(stack.name, row, stop, raw)
        values = out_f32[(row - first) * spec.n_cols : (stop - first) * spec.n_cols]
        CODECS[spec.dtype].decode(raw, values)
        if scale != 1:
            values *= scale
