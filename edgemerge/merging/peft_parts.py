"""The tensors of a PEFT adapter to be, made of changes that are as GGUF has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgemerge.errors import MismatchError
from edgemerge.formats.adapters.adapted import without_adapters
from edgemerge.formats.adapters.forms import repeats_embedding
from edgemerge.formats.adapters.layout import find_module, peft_config
from edgemerge.formats.adapters.names import BaseNames, Target
from edgemerge.merging.adapter_parts import (
    EMBEDDING,
    HEAD,
    AdapterPart,
    Extracted,
    PartMaker,
    Spool,
)
from edgemerge.types import Float32, Source

__all__ = ["PeftParts"]

FRONT = "base_model.model."
EMBEDDINGS = (EMBEDDING, "per_layer_token_embd.weight")
# Ends of GGUF's names of matrices to which PEFT adds no factors: filters, and a norm in rows
NO_FACTORS = (".shortconv.conv.weight", ".ssm_conv1d.weight", ".ssm_norm.weight")
# The same, of an architecture: `_check_lora_target_modules_mamba` of peft
NOT_ADAPTED = {"falcon-h1": (".ssm_out.weight",)}


class PeftParts(PartMaker):
    """Makes the tensors of a PEFT directory."""

    def __init__(self, base: Source, spool: Spool, dtype: str, alpha: float) -> None:
        super().__init__(base, spool, dtype, alpha)
        self._names = BaseNames(base)

    def make(self, found: Sequence[Extracted]) -> tuple[list[AdapterPart], bytes, list[str]]:
        """Name the tensors as PEFT does, write adapter_config.json, and say what is left out.

        Raises
        ------
        MismatchError
            A matrix has no name that PEFT would find, or nobody knows how GGUF's values came from it. Or
            nothing is left.
        """
        if self._names.repeats_embedding:
            found = self._without_head(found)
        parts, ranks, saved = list[AdapterPart](), dict[str, int](), list[str]()
        others, biases = list[str](), list[str]()
        no_factors = NO_FACTORS + NOT_ADAPTED.get(self._base.architecture, ())
        has_bias = False
        modules: dict[str, list[tuple[Extracted, Target]]] = {}
        for one in found:
            if one.rank:
                name, target = self._find(one)
                if not name.endswith(".weight") or one.change.name.endswith(no_factors):
                    others.append(name)
                    continue
                modules.setdefault(name.removesuffix(".weight"), []).append((one, target))
        for module, changes in modules.items():
            ranks[module] = sum(one.rank for one, _ in changes)
            parts += self._pair(changes, f"{FRONT}{module}")
        for one in found:
            if one.rank:
                continue
            name, target = self._find(one)
            module, _, end = name.rpartition(".")
            if end == "bias" and module not in ranks:
                biases.append(module)
                continue
            if end not in ("weight", "bias"):
                others.append(name)
                continue
            has_bias |= end == "bias"
            if end == "weight":
                saved.append(module)
            stored = f"{FRONT}{module}.{'base_layer.bias' if end == 'bias' else end}"
            parts.append(
                self.part(stored, one.change.shape, self._hub_vector(one, target), dtype="F32")
            )
        if not parts:
            raise MismatchError(
                f"no change of {self._base.path} has a place in PEFT's adapters, such as that of "
                f"{[*others, *biases][0]!r}; edgemerge delta keeps all changes"
            )
        notes = []
        if biases:
            notes.append(
                f"PEFT saves biases of changed matrices only: those of {len(biases)} others are left "
                f"out, such as that of {biases[0]}"
            )
        if others:
            notes.append(
                f"PEFT takes no adapters of filters and of other parts of state spaces: the changes of "
                f"{len(others)} are left out, such as that of {others[0]}"
            )
        config = peft_config(self._base, ranks, saved, self._alpha, has_bias=has_bias)
        return parts, config, notes

    def _without_head(self, found: Sequence[Extracted]) -> list[Extracted]:
        """Leave out a head that is the embedding, whose change is the head's too."""
        kept = []
        for one in found:
            if one.change.name in (EMBEDDING, HEAD) and not repeats_embedding(
                without_adapters(one.change.expert)
            ):
                raise MismatchError(
                    f"the head of {self._base.path} is its embedding, and that of "
                    f"{one.change.expert.path} is not; write a GGUF adapter (-o NAME.gguf)",
                    tensor=one.change.name,
                )
            if one.change.name != HEAD:
                kept.append(one)
        return kept

    def _find(self, one: Extracted) -> tuple[str, Target]:
        name = one.change.name
        found = find_module(self._base, self._names, name, one.change.number)
        if found is None:
            raise MismatchError(
                f"tensor {name!r} of {self._base.path} has no name that PEFT would find it by; write a "
                "GGUF adapter (-o NAME.gguf)",
                tensor=name,
            )
        if found[1].is_lost:
            raise MismatchError(
                f"{self._base.path}: no GGUF of {self._base.architecture} states by which factors or in "
                f"which order {name!r} was converted, so that PEFT's change cannot be found; write a GGUF "
                "adapter (-o NAME.gguf), or give the directory that the base was made from",
                tensor=name,
            )
        return found

    def _pair(self, changes: Sequence[tuple[Extracted, Target]], name: str) -> list[AdapterPart]:
        """Make A and B of a module, of which each tensor of GGUF has some rows.

        With two tensors of ranks 3 and 2, A has the three rows of the one above the two of the other. B has
        three columns that are 0 in the other's rows, and two that are 0 in the one's.
        """
        first, target = changes[0]
        n_rows, n_cols = target.n_stored, first.change.shape[1]
        rank = sum(one.rank for one, _ in changes)

        def left() -> Float32:
            values, begin = np.zeros((n_rows, rank), np.float32), 0
            for one, target in changes:
                own = self.left(one, rank)[: target.n_rows]
                if target.factors is not None:
                    target.factors.undo(own, 0)
                rows = target.stored_row + target.order.rows(0, target.n_rows)
                values[rows, begin : begin + one.rank] = own
                begin += one.rank
            return values

        def right() -> Float32:
            parts = [target.order.undo_columns(self.right(one)) for one, target in changes]
            return np.concatenate(parts)

        if first.change.name in EMBEDDINGS:
            name += ".lora_embedding_"
            return [
                self.part(f"{name}A", (rank, n_rows), lambda: left().T),
                self.part(f"{name}B", (n_cols, rank), lambda: right().T),
            ]
        name += ".lora_"
        return [
            self.part(f"{name}A.weight", (rank, n_cols), right),
            self.part(f"{name}B.weight", (n_rows, rank), left),
        ]

    def _hub_vector(self, one: Extracted, target: Target) -> Callable[[], Float32]:
        def make() -> Float32:
            values = self.vector(one).reshape(-1, 1).copy()
            if target.change is not None:
                target.change.undo(values, 0)
            return target.order.undo_rows(values).reshape(-1)

        return make
