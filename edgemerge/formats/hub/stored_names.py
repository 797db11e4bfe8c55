"""How transformers names the tensors that a GGUF tensor is stored as, and what else is in these.

The tables are those by which directories are read, taken from GGUF's side. Experts are named one by one
where their family has names for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgemerge.formats.architectures import layer_index
from edgemerge.formats.hub.config import HubConfig
from edgemerge.formats.hub.cuts import Stored

__all__ = ["StoredAs", "StoredNames"]

CONV = "shortconv.conv.weight"


@dataclass(frozen=True, slots=True)
class StoredAs:
    """One or several stored tensors that are of one size, and the GGUF tensors that they hold."""

    parts: tuple[str, ...]  # GGUF names
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # transformers' name -> shape


class StoredNames:
    """Finds the stored tensors of a model.

    Parameters
    ----------
    config : HubConfig
        Of the directory.
    """

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def find(self, name: str) -> StoredAs | None:
        """Return what a GGUF tensor is stored as; None where the family has none of that name."""
        layer = layer_index(name)
        if layer is None:
            own, hf = "", ""
            stem = name
        else:
            own, hf = f"blk.{layer}.", f"model.layers.{layer}."
            stem = name.removeprefix(own)
            if layer >= self._config.n_layers or self._config.lacks(layer, stem):
                return None
        found = next(self._find(layer, stem), None)
        if found is None:
            return None
        stems, shapes = found
        parts = tuple(own + part for part in stems)
        return StoredAs(parts, tuple((hf + stored, shape) for stored, shape in shapes.items()))

    def is_unused(self, name: str) -> bool:
        """Tell whether inference does without a tensor of GGUF, so that a directory need not have it."""
        layer = layer_index(name)
        if layer is None or layer >= self._config.n_layers:
            return False
        hf = self._config.family.block.get(name.removeprefix(f"blk.{layer}."))
        stored = self._config.cuts(layer).get(hf or "")
        return stored is not None and (stored.may_lack or not stored.cuts)

    def _find(
        self, layer: int | None, stem: str
    ) -> Iterator[tuple[tuple[str, ...], Mapping[str, tuple[int, ...]]]]:
        """Yield GGUF names, and names and shapes of what is stored, both within the layer; the best first."""
        config, family = self._config, self._config.family
        if layer is not None and stem in family.experts:
            shape, names = config.expected_shape(stem), family.experts[stem]
            yield (stem,), {names.format(i): shape for i in range(config.n_experts)}
        cuts = {
            hf: stored
            for hf, stored in config.cuts(layer).items()
            if any(cut.stem == stem for cut in stored.cuts)
        }
        for stored in cuts.values():
            stems = tuple(cut.stem for cut in stored.cuts)
            yield (
                stems,
                {hf: cuts[hf].shape for hf in sorted(cuts, key=lambda hf: _number(cuts[hf]))},
            )
        plain = family.outside if layer is None else family.block
        if stem in plain:
            shape = config.expected_shape(stem)
            # One filter for each channel
            yield (stem,), {plain[stem]: (shape[0], 1, *shape[1:]) if stem == CONV else shape}
        for whole, halves in family.halves.items():
            if layer is not None and stem in halves:
                *stack, n_rows, n_cols = config.expected_shape(stem)
                yield halves, {whole: (*stack, 2 * n_rows, n_cols)}
        for whole, columns in family.columns.items():
            if layer is not None and stem in columns:
                n_experts, n_out, *inputs = config.expected_shape(stem)
                yield columns, {whole: (n_experts, *inputs, len(columns) * n_out)}


def _number(stored: Stored) -> int:
    return stored.member[0]
