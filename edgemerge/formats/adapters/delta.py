"""Deltas in GGUF files, as `edgemerge delta` writes them: what an expert changed of its base, in few bits.

A GGUF file with `general.type` delta. A changed tensor of the base is stored in one of three forms:

- coded: `NAME`, in blocks of a ggml type; where rows are no whole blocks, as one row, with zeros at its end
- sparse: `NAME.sparse_end`, `NAME.sparse_at` and `NAME.sparse_value`, as of `SparseRows`
- low rank: `NAME.lora_a` and `NAME.lora_b`, as in a LoRA adapter for llama.cpp

A tensor that is not there did not change. What is stored is multiplied by two to the power of
`delta.exponents`, which has an integer for each changed tensor in the order of the file. So numbers of 1e-6
have scales that binary16 can hold.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.adapters.base_sample import sample_checksum
from edgemerge.formats.adapters.delta_values import GROUP, CodedRows, SparseRows, StoredValues
from edgemerge.formats.adapters.gguf import OBJECTS_BYTES, GgufAdapter
from edgemerge.formats.adapters.updates import Update
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.gguf.model import GgufFile
from edgemerge.formats.gguf.types import block_size
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.shared_tables import share_table
from edgemerge.types import TensorSpec

__all__ = [
    "DELTA",
    "EXPONENTS",
    "KEPT",
    "SAMPLE",
    "VERSION",
    "VERSION_KEY",
    "DeltaAdapter",
    "is_delta",
]
__all__ += ["SPARSE", "tensor_name"]

DELTA = "delta"  # general.type
VERSION_KEY, VERSION = "delta.version", 1
EXPONENTS, SAMPLE, KEPT = "delta.exponents", "delta.base_sample_crc32", "delta.kept"
SPARSE = ("sparse_end", "sparse_at", "sparse_value")
SPARSE_TYPES = ("I32", "I8")
LARGEST_EXPONENT = 126  # of float32, one less
OWN_BYTES = 8_000  # Python's objects for a delta whose tables another has too


def is_delta(file: GgufFile) -> bool:
    """Tell whether a GGUF file is a delta."""
    return get_value(file.metadata, "general.type") == DELTA


def tensor_name(stored: str) -> str:
    """Return the name of the base's tensor that a stored one belongs to."""
    home, _, kind = stored.rpartition(".")
    return home if kind in (*SPARSE, "lora_a", "lora_b") else stored


class DeltaAdapter(GgufAdapter):
    """A delta, fitted to a base; updates add to it.

    Raises
    ------
    FormatError
        It is damaged, or of a version that is not read.
    MismatchError
        It was made for another base.
    """

    def _check_kind(self) -> None:
        metadata, path = self._file.metadata, self.path
        version = get_value(metadata, VERSION_KEY)
        if version != VERSION:
            raise FormatError(
                f"is a delta of version {version!r}, and version {VERSION} is read; update edgemerge, or "
                "get it again",
                path=path,
            )
        self._check_architecture()
        if get_value(metadata, SAMPLE) != sample_checksum(self._base):
            raise MismatchError(
                f"{path} is a delta of another base than {self._base.path}: their checksums differ; "
                f"{self._remedy()}"
            )

    def _sort(self) -> None:
        names = dict.fromkeys(map(tensor_name, self._file.specs))
        if not names:
            raise FormatError("holds no change; get the delta again", path=self.path)
        self._numbers = share_table({name: i for i, name in enumerate(names)})
        self._powers = array("b", self._exponents(len(names)))
        self._factors: dict[str, list[Update]] = {}
        for name in names:
            updates = self._make_updates(name)
            if updates[0].change is not None:  # a thread knows its last A by the object
                self._factors[name] = updates

    def updates(self) -> Mapping[str, Sequence[Update]]:
        """List what it changes, by GGUF name; made when it is asked for, as a merge may have a thousand."""
        return _DeltaUpdates(self._numbers, self._find_updates)

    def held_parts(self) -> Mapping[int, int]:
        """Count the file's table of tensors, which deltas have alike, and its own part."""
        kept = 4 * OBJECTS_BYTES * len(self._factors)
        tables = 2 * OBJECTS_BYTES * len(self._file.specs)
        texts = sum(map(len, self._file.metadata.values()))
        return {id(self): OWN_BYTES + texts + kept, id(self._file.specs): tables}

    def _find_updates(self, name: str) -> Sequence[Update]:
        return self._factors.get(name) or self._make_updates(name)

    def _make_updates(self, name: str) -> list[Update]:
        specs = self._file.specs
        theirs = self._names.spec(name)
        stored = {kind: specs.get(f"{name}.{kind}") for kind in (*SPARSE, "lora_a", "lora_b")}
        by_kind = {"": specs.get(name)} | stored
        found = {kind: spec for kind, spec in by_kind.items() if spec is not None}
        if theirs is None:
            raise self._refuse(next(iter(found.values())), None)
        scale = 2.0 ** self._powers[self._numbers[name]]
        if found.keys() == {""}:
            return [self._coded(found[""], theirs, scale)]
        if found.keys() == {"lora_a", "lora_b"}:
            self._change(name, found["lora_a"], found["lora_b"], self._alpha())
            return self._updates.pop(name)
        if found.keys() == set(SPARSE):
            return [self._sparse([found[kind] for kind in SPARSE], theirs, scale)]
        raise FormatError(
            "lacks a part of its change, or has one too many; get the delta again",
            path=self.path,
            tensor=name,
        )

    def _exponents(self, count: int) -> list[int]:
        stated = get_value(self._file.metadata, EXPONENTS)
        found = list(stated) if isinstance(stated, Array) and len(stated) == count else []
        exponents = [e for e in found if type(e) is int and abs(e) <= LARGEST_EXPONENT]
        if len(exponents) != count:
            raise FormatError(
                f"states no {EXPONENTS} for its {count} changed tensors; get the delta again",
                path=self.path,
            )
        return exponents

    def _coded(self, spec: TensorSpec, theirs: TensorSpec, scale: float) -> Update:
        length = block_size(spec.dtype)[0]
        in_one_row = (-(-theirs.n_elements // length) * length,)
        if spec.dtype not in CODECS or spec.shape not in (theirs.shape, in_one_row):
            raise self._refuse(spec, theirs)
        shape = _rows(theirs)
        return Update(0, shape[0], added=(CodedRows(self._values(spec), shape), scale))

    def _sparse(self, stored: list[TensorSpec], theirs: TensorSpec, scale: float) -> Update:
        ends, places, values = stored
        length = block_size(values.dtype)[0]
        count = places.n_elements
        if (
            (ends.dtype, places.dtype) != SPARSE_TYPES
            or values.dtype not in CODECS
            or ends.shape != (-(-theirs.n_elements // GROUP),)
            or values.shape != (-(-count // length) * length,)
            or len(places.shape) != 1
        ):
            raise self._refuse(ends, theirs)
        if count > theirs.n_elements:
            raise FormatError(
                f"has {count} values for {theirs.n_elements} elements; the delta is damaged, get it again",
                path=self.path,
                tensor=places.name,
            )
        read = self._file.read_bytes
        rows = SparseRows(
            partial(read, ends.name),
            partial(read, places.name),
            self._values(values),
            count,
            _rows(theirs),
        )
        return Update(0, rows.shape[0], added=(rows, scale))

    def _values(self, spec: TensorSpec) -> StoredValues:
        return StoredValues(spec, self.path, partial(self._file.read_bytes, spec.name))


class _DeltaUpdates(Mapping[str, Sequence[Update]]):
    """What a delta changes, by GGUF name."""

    def __init__(self, names: Mapping[str, int], find: Callable[[str], Sequence[Update]]) -> None:
        self._names, self._find = names, find

    def __getitem__(self, name: str) -> Sequence[Update]:
        if name not in self._names:
            raise KeyError(name)
        return self._find(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def _rows(spec: TensorSpec) -> tuple[int, int]:
    """Return rows and columns of a tensor, whose changes are read by rows; of a vector, elements and one."""
    return (spec.n_cols, 1) if len(spec.shape) == 1 else (spec.n_rows, spec.n_cols)
