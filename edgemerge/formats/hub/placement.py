"""Where each tensor of a Hugging Face directory to be will lie: shapes, shards and headers.

`edgemerge.formats.hub.stored_names` names them. How GGUF's tensors lie in them is then read from the files to
be by `edgemerge.formats.hub.inventory`, as it is from files that are there. Format of a shard:
`edgemerge.formats.hub.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from edgemerge.errors import MismatchError
from edgemerge.formats.gguf.split import divide_tensors
from edgemerge.formats.hub.config import HubConfig
from edgemerge.formats.hub.files import SINGLE, shard_name
from edgemerge.formats.hub.inventory import Inventory, Place
from edgemerge.formats.hub.safetensors import DTYPE_BITS, METADATA_KEY, StoredTensor
from edgemerge.formats.hub.stored_names import StoredNames
from edgemerge.formats.layout import FileLayout
from edgemerge.types import TensorSpec

__all__ = ["SHARD_BYTES", "Shard", "Unit", "find_places", "index_file", "list_units", "make_shards"]

SHARD_BYTES = 5_000_000_000  # most bytes of tensors in one file, where nobody says otherwise
WEIGHTS = Path("weights")  # stands for all files, where it does not matter which has a tensor


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that lie together, and how the file names them."""

    tensors: tuple[TensorSpec, ...]  # GGUF's
    stored: tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of all of equal size

    @property
    def dtype(self) -> str:
        """Type of all."""
        return self.tensors[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        n_elements = sum(prod(shape) for _, shape in self.stored)
        return n_elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights."""

    layout: FileLayout
    stored: Mapping[str, StoredTensor]  # by transformers' name; offsets from the end of the header


def list_units(config: HubConfig, specs: Sequence[TensorSpec]) -> list[Unit]:
    """Name the tensors of an output as transformers does.

    Parameters
    ----------
    config : HubConfig
        Of the output.
    specs : sequence of TensorSpec
        All tensors by GGUF name, of one type that safetensors has.

    Raises
    ------
    MismatchError
        The family has no such tensor, or it is of another shape than config.json makes it, or one lacks.
    """
    found = {spec.name: spec for spec in specs}
    names, units = StoredNames(config), []
    while found:
        unit = _make_unit(config, names, next(iter(found)), found)
        units.append(unit)
        for spec in unit.tensors:
            del found[spec.name]
    _check_shapes(config, units)
    return units


def _make_unit(
    config: HubConfig, names: StoredNames, name: str, found: Mapping[str, TensorSpec]
) -> Unit:
    stored = names.find(name)
    if stored is None or not set(stored.parts) <= set(found):
        raise MismatchError(
            f"has no place in a directory of {config.model_type}; write a GGUF instead", tensor=name
        )
    return Unit(tuple(found[part] for part in stored.parts), stored.shapes)


def _check_shapes(config: HubConfig, units: Sequence[Unit]) -> None:
    """Read the directory to be as any other, and compare the tensors that it has."""
    inventory = Inventory(config, {WEIGHTS: _lay_out(units)})
    for spec in (spec for unit in units for spec in unit.tensors):
        if spec.shape != (expected := inventory.specs[spec.name].shape):
            raise MismatchError(
                f"its shape is {list(spec.shape)}, and a directory of {config.model_type} has it as "
                f"{list(expected)}; write a GGUF instead",
                tensor=spec.name,
            )
    if (lacking := inventory.missing()) is not None:
        raise MismatchError(
            f"is missing, and a directory of {config.model_type} has it; write a GGUF instead",
            tensor=lacking,
        )


def _lay_out(units: Sequence[Unit]) -> dict[str, StoredTensor]:
    """Put tensors one after the other, with offsets from the first."""
    stored: dict[str, StoredTensor] = {}
    at = 0
    for unit in units:
        step = unit.nbytes // len(unit.stored)
        for name, shape in unit.stored:
            stored[name] = StoredTensor(unit.dtype, shape, at, step)
            at += step
    return stored


def find_places(config: HubConfig, shards: Mapping[Path, Shard]) -> Mapping[str, Place]:
    """Return how each GGUF tensor lies in files to be, as whoever reads them will find it.

    Parameters
    ----------
    config : HubConfig
        Of the output.
    shards : mapping of Path to Shard
        From `make_shards`, under the names that the places will state.
    """
    return Inventory(config, {path: _in_file(shard) for path, shard in shards.items()}).places


def _in_file(shard: Shard) -> dict[str, StoredTensor]:
    first = len(shard.layout.header)
    return {
        name: replace(tensor, offset=first + tensor.offset) for name, tensor in shard.stored.items()
    }


def make_shards(
    units: Sequence[Unit], max_bytes: int, metadata: Mapping[str, str]
) -> dict[str, Shard]:
    """Lay out the safetensors files of a directory: file name -> shard.

    Parameters
    ----------
    units : sequence of Unit
        From `list_units`; no unit is divided.
    max_bytes : int
        Most bytes of tensors in one file.
    metadata : mapping of str to str
        What the header of the first file says besides.
    """
    by_name = {unit.tensors[0].name: unit for unit in units}
    wholes = [TensorSpec(name, (), "", unit.nbytes) for name, unit in by_name.items()]
    parts = divide_tensors(wholes, max_bytes)
    shards = {}
    for i, part in enumerate(parts):
        own = [by_name[spec.name] for spec in part]
        name = SINGLE if len(parts) == 1 else shard_name(i + 1, len(parts))
        shards[name] = _make_shard(own, metadata if i == 0 else {})
    return shards


def _make_shard(units: Sequence[Unit], metadata: Mapping[str, str]) -> Shard:
    table: dict[str, object] = {METADATA_KEY: {"format": "pt", **metadata}}
    stored = _lay_out(units)
    for name, tensor in stored.items():
        table[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that data is aligned
    header = len(text).to_bytes(8, "little") + text
    return Shard(FileLayout(header, {}, len(header) + sum(unit.nbytes for unit in units)), stored)


def index_file(shards: Mapping[str, Shard], units: Sequence[Unit]) -> bytes | None:
    """Return the index of several shards, as transformers writes it; None where one file has all."""
    if len(shards) == 1:
        return None
    weights = {name: shard for shard, content in shards.items() for name in content.stored}
    table = {
        "metadata": {"total_size": sum(unit.nbytes for unit in units)},
        "weight_map": dict(sorted(weights.items())),
    }
    return json.dumps(table, indent=2).encode() + b"\n"
