"""The factors of a PEFT adapter by themselves, without a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.formats.adapters.config import ADAPTER_CONFIG, AdapterConfig
from edgemerge.formats.adapters.factors import FactorFile, StoredMatrix
from edgemerge.formats.adapters.peft import DTYPES, find_weights
from edgemerge.formats.adapters.peft_names import bare_name, check_is_one, split_factor
from edgemerge.formats.hub.safetensors import StoredTensor, read_header
from edgemerge.suggestions import suggest_path

__all__ = ["AdapterPairs", "Pair"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B of one module, as stored: the change is `scale * B @ A`, of an embedding its transpose."""

    names: tuple[str, str]  # of A and B in a file
    module: str  # without what PEFT puts before it
    a: StoredMatrix  # (rank, n)
    b: StoredMatrix  # (m, rank)
    scale: float

    @property
    def rank(self) -> int:
        """The rank of its factors."""
        return self.a.shape[0]


class AdapterPairs:
    """All factors of a PEFT directory that has nothing else.

    Raises
    ------
    FormatError
        It is damaged, or has more than A and B: what is saved whole, and DoRA, cannot be combined.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FormatError(f"there is no such folder{suggest_path(path)}", path=path)
        if not (path / ADAPTER_CONFIG).is_file():
            raise FormatError(
                f"is no PEFT adapter: it has no {ADAPTER_CONFIG}; give one", path=path
            )
        self.path = path
        self.config = AdapterConfig(path)
        weights = find_weights(path)
        header = read_header(weights)
        self._file = FactorFile(weights)
        self.pairs: dict[str, Pair] = {}
        try:
            self._sort(header)
        except BaseException:
            self.close()
            raise

    def _sort(self, header: Mapping[str, StoredTensor]) -> None:
        check_is_one(header, self.path)
        if self.config.raw.get("target_parameters"):  # whose factors hold all experts, one by one
            raise FormatError(
                "has factors of whole stacks of experts, which are not combined; give the adapters to "
                "merge, as MODEL+ADAPTER",
                path=self.path,
            )
        found: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
        for stored, tensor in header.items():
            module, kind = split_factor(stored)
            if kind not in ("A", "B", "embedding_A", "embedding_B") or tensor.dtype not in DTYPES:
                raise FormatError(
                    "is no plain factor of LoRA, and only these can be combined; give the adapters to "
                    "merge, as MODEL+ADAPTER",
                    path=self.path,
                    tensor=stored,
                )
            found.setdefault(module, {})[kind[-1]] = stored, tensor
        for module, factors in found.items():
            (name_a, a), (name_b, b) = (factors.get(k, ("", None)) for k in "AB")
            if a is None or b is None or len(a.shape) != 2 or a.shape[:1] != b.shape[1:]:
                raise FormatError(
                    "has no A that fits its B; get the adapter again",
                    path=self.path,
                    tensor=name_a or name_b,
                )
            names, bare = (name_a, name_b), bare_name(module)
            scale = self.config.scale((module, bare), a.shape[0])
            matrices = self._matrix(name_a, a), self._matrix(name_b, b)
            self.pairs[module] = Pair(names, bare, *matrices, scale)
        if not self.pairs:
            raise FormatError("holds no LoRA; get it again", path=self.path)

    def _matrix(self, name: str, tensor: StoredTensor) -> StoredMatrix:
        n_rows, n_cols = tensor.shape
        return self._file.matrix(name, DTYPES[tensor.dtype], (n_rows, n_cols), tensor.offset)

    def combined_config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Return adapter_config.json of a combination: of this adapter's, with other ranks and no scale.

        Parameters
        ----------
        ranks : mapping of str to int
            Rank of each module, by `Pair.module`.
        """
        highest = max(ranks.values())
        others = {module: rank for module, rank in sorted(ranks.items()) if rank != highest}
        return self.config.raw | {
            "r": highest,
            "lora_alpha": highest,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
            # The first adapter's own choice of layers; another's would be left out by peft.
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
            "init_lora_weights": True,
            "use_rslora": False,
        }

    def check_unchanged(self) -> None:
        """Raise FormatError where the factors were written to since they were opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
