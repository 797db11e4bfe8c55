"""Where each tensor of a Hugging Face directory to be will lie: names, shapes, shards and headers.

The names are those of `edgemerge.formats.architectures.FAMILIES`, read from GGUF's side. Experts are stored
one by one, in the order of their stack. So a stack is still one run of bytes, and so are two matrices that a
family stores as one. Format of a shard: `edgemerge.formats.hub.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from edgemerge.errors import MismatchError
from edgemerge.formats.architectures import ROTARY_HEADS, layer_index
from edgemerge.formats.gguf.split import divide_tensors
from edgemerge.formats.hub.config import HubConfig
from edgemerge.formats.hub.files import SINGLE, shard_name
from edgemerge.formats.hub.safetensors import METADATA_KEY
from edgemerge.formats.layout import FileLayout
from edgemerge.types import TensorSpec

__all__ = ["SHARD_BYTES", "Unit", "head_length", "index_file", "list_units", "make_shards"]

SHARD_BYTES = 5_000_000_000  # most bytes of tensors in one file, where nobody says otherwise
CONV = "shortconv.conv.weight"


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that lie together, and how the file names them."""

    tensors: tuple[TensorSpec, ...]  # GGUF's, one after the other
    stored: tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of all of equal size

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(spec.nbytes for spec in self.tensors)


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
        The family has no such tensor, or it is of another shape than config.json makes it.
    """
    found = {spec.name: spec for spec in specs}
    units = []
    while found:
        name = next(iter(found))
        unit = _find_unit(config, name, found)
        units.append(unit)
        for spec in unit.tensors:
            del found[spec.name]
    return units


def _find_unit(config: HubConfig, name: str, found: Mapping[str, TensorSpec]) -> Unit:
    family, spec, layer = config.family, found[name], layer_index(name)
    if layer is None:
        if name not in family.outside:
            raise _no_place(config, name)
        _check_shape(config, name, name, spec.shape)
        return Unit((spec,), ((family.outside[name], spec.shape),))
    prefix, stem = f"model.layers.{layer}.", name.split(".", 2)[2]
    if stem in family.block:
        _check_shape(config, name, stem, spec.shape)
        shape = spec.shape
        if stem == CONV:  # one filter for each channel
            shape = (shape[0], 1, *shape[1:])
        return Unit((spec,), ((prefix + family.block[stem], shape),))
    if stem in family.experts:
        _check_shape(config, name, stem, spec.shape[1:])
        names = [prefix + family.experts[stem].format(i) for i in range(spec.shape[0])]
        return Unit((spec,), tuple((expert, spec.shape[1:]) for expert in names))
    for whole, stems in family.halves.items():
        if stem in stems:
            halves = tuple(found.get(f"blk.{layer}.{half}") for half in stems)
            upper, lower = halves
            if upper is None or lower is None:
                raise _no_place(config, name)
            _check_shape(config, name, stem, spec.shape)
            rows = upper.shape[0] + lower.shape[0]
            return Unit((upper, lower), ((prefix + whole, (rows, *upper.shape[1:])),))
    raise _no_place(config, name)


def _check_shape(config: HubConfig, name: str, stem: str, shape: tuple[int, ...]) -> None:
    expected = config.expected_shape(stem)
    if shape != expected:
        raise MismatchError(
            f"its shape is {list(shape)}, and a directory of {config.model_type} has it as "
            f"{list(expected)}; write a GGUF instead",
            tensor=name,
        )


def _no_place(config: HubConfig, name: str) -> MismatchError:
    return MismatchError(
        f"has no place in a directory of {config.model_type}; write a GGUF instead", tensor=name
    )


def head_length(config: HubConfig, name: str) -> int:
    """Return the length of a head where a file has the items of q and k in another order; else 0."""
    stem = name.split(".", 2)[-1]
    return config.head_dim if config.family.rotates_pairs and stem in ROTARY_HEADS else 0


def make_shards(
    units: Sequence[Unit], max_bytes: int, metadata: Mapping[str, str]
) -> dict[str, FileLayout]:
    """Lay out the safetensors files of a directory: file name -> layout.

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
    layouts = {}
    for i, part in enumerate(parts):
        own = [by_name[spec.name] for spec in part]
        name = SINGLE if len(parts) == 1 else shard_name(i + 1, len(parts))
        layouts[name] = _make_shard(own, metadata if i == 0 else {})
    return layouts


def _make_shard(units: Sequence[Unit], metadata: Mapping[str, str]) -> FileLayout:
    table: dict[str, object] = {METADATA_KEY: {"format": "pt", **metadata}}
    relative: dict[str, int] = {}
    at = 0
    for unit in units:
        sizes = [spec.nbytes for spec in unit.tensors]
        starts = accumulate(sizes, initial=at)
        relative |= {spec.name: start for spec, start in zip(unit.tensors, starts, strict=False)}
        step = unit.nbytes // len(unit.stored)
        for name, shape in unit.stored:
            table[name] = {
                "dtype": unit.tensors[0].dtype,
                "shape": list(shape),
                "data_offsets": [at, at + step],
            }
            at += step
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that data is aligned
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(
        header, {name: len(header) + start for name, start in relative.items()}, len(header) + at
    )


def index_file(shards: Mapping[str, FileLayout], units: Sequence[Unit]) -> bytes | None:
    """Return the index of several shards, as transformers writes it; None where one file has all."""
    if len(shards) == 1:
        return None
    weights = dict(sorted(_weight_map(shards, units)))
    total = {"total_size": sum(unit.nbytes for unit in units)}
    return json.dumps({"metadata": total, "weight_map": weights}, indent=2).encode() + b"\n"


def _weight_map(
    shards: Mapping[str, FileLayout], units: Sequence[Unit]
) -> Iterator[tuple[str, str]]:
    homes = {name: shard for shard, layout in shards.items() for name in layout.offsets}
    for unit in units:
        for name, _ in unit.stored:
            yield name, homes[unit.tensors[0].name]
