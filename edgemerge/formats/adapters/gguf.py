"""LoRA adapters in GGUF files, as llama.cpp's convert_lora_to_gguf.py writes them and `--lora` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.adapters.factors import Factor, StoredMatrix
from edgemerge.formats.adapters.names import BaseNames
from edgemerge.formats.adapters.updates import LowRank, Update
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.model import GgufFile
from edgemerge.formats.quants.codec import find_codec
from edgemerge.types import FileState, Source, TensorSpec

__all__ = ["ALPHA", "OBJECTS_BYTES", "GgufAdapter", "count_objects", "is_adapter"]

OBJECTS_BYTES = 400  # Python's objects for one tensor; those for a change are four times as many

ALPHA, INVOCATION = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
EMBEDDING = "token_embd.weight"


def is_adapter(file: GgufFile) -> bool:
    """Tell whether a GGUF file is a LoRA adapter."""
    return get_value(file.metadata, "general.type") == "adapter"


class GgufAdapter:
    """A GGUF adapter, fitted to a base.

    Parameters
    ----------
    file : GgufFile
        Open; it is closed with this, also when this fails.
    base : Source
        Open.

    Raises
    ------
    FormatError
        It is damaged, or no LoRA.
    MismatchError
        It was made for another base.
    """

    def __init__(self, file: GgufFile, base: Source) -> None:
        self.path, self._base = file.path, base
        self._file = file
        self._updates: dict[str, list[Update]] = {}
        try:
            self._names = BaseNames(base)
            self._check_kind()
            self._sort()
        except BaseException:
            self.close()
            raise

    def _check_kind(self) -> None:
        metadata = self._file.metadata
        if not is_adapter(self._file) or get_value(metadata, "adapter.type") != "lora":
            raise FormatError("is no LoRA adapter; give one after the plus", path=self.path)
        if INVOCATION in metadata:
            raise FormatError(
                "acts only after certain tokens (aLoRA), which no weight can stand for; give it to run, "
                "chat or serve with --lora",
                path=self.path,
            )
        self._check_architecture()

    def _check_architecture(self) -> None:
        own = get_value(self._file.metadata, "general.architecture")
        if own != self._base.architecture:
            raise MismatchError(
                f"{self.path} is an adapter of a {own} model and {self._base.path} is a "
                f"{self._base.architecture} model; {self._remedy()}"
            )

    def _sort(self) -> None:
        specs, alpha = self._file.specs, self._alpha()
        for name, spec in specs.items():
            home, _, kind = name.rpartition(".")
            if kind == "lora_b" and f"{home}.lora_a" in specs:
                continue
            if kind not in ("lora_a", "lora_b"):
                self._replace(spec)
                continue
            if f"{home}.lora_b" not in specs:
                raise FormatError(
                    "stands without lora_b; get it again", path=self.path, tensor=name
                )
            self._change(home, spec, specs[f"{home}.lora_b"], alpha)
        if not self._updates:
            raise FormatError("holds no LoRA; get it again", path=self.path)

    def _alpha(self) -> float:
        alpha = get_value(self._file.metadata, ALPHA)
        return float(alpha) if isinstance(alpha, int | float) else 0.0

    def _replace(self, spec: TensorSpec) -> None:
        """Take a norm, which stands for the base's (mergekit-extract-lora)."""
        theirs = self._names.spec(spec.name)
        if theirs is None or theirs.shape != spec.shape or len(spec.shape) != 1:
            raise self._refuse(spec, theirs)
        factor = Factor(self._matrix(spec, (spec.n_cols, 1)), (spec.n_cols, 1))
        self._updates[spec.name] = [Update(0, spec.n_cols, factor)]

    def _change(self, name: str, a: TensorSpec, b: TensorSpec, alpha: float) -> None:
        theirs = self._names.spec(name)
        if theirs is None or len(theirs.shape) < 2 or len(a.shape) < 2 or len(b.shape) < 2:
            raise self._refuse(a, theirs)
        if name == EMBEDDING:  # llm_build_inp_embd: a row of A per token, B as it is
            rank = a.n_cols
            if a.shape != (theirs.n_rows, rank) or b.shape != (theirs.n_cols, rank):
                raise self._refuse(a, theirs)
            left = Factor(self._matrix(a, a.shape), (theirs.n_rows, rank))
            right = Factor(self._matrix(b, b.shape), (rank, theirs.n_cols), transposed=True)
            update = Update(0, theirs.n_rows, change=LowRank(left, right, _scale(alpha, rank)))
            self._updates[name] = [update]
            return
        rank, stack = b.n_cols, theirs.shape[:-2]
        if a.shape != (*stack, rank, theirs.n_cols) or b.shape != (*theirs.shape[:-1], rank):
            raise self._refuse(a if a.n_cols != theirs.n_cols else b, theirs)
        n_rows = theirs.shape[-2]
        one = self._matrix(b, (b.n_rows, rank)), self._matrix(a, (a.n_rows, a.n_cols))
        self._updates[name] = []
        for i in range(stack[0] if stack else 1):  # experts, one after the other
            left = Factor(one[0], (n_rows, rank), i * n_rows)
            right = Factor(one[1], (rank, theirs.n_cols), i * rank)
            update = Update(i * n_rows, n_rows, change=LowRank(left, right, _scale(alpha, rank)))
            self._updates[name].append(update)

    def _matrix(self, spec: TensorSpec, shape: Sequence[int]) -> StoredMatrix:
        find_codec(spec)
        n_rows, n_cols = shape
        fill = partial(self._file.read_bytes, spec.name)
        return StoredMatrix(spec.name, spec.dtype, (n_rows, n_cols), self.path, fill)

    def _remedy(self) -> str:
        name = get_value(self._file.metadata, "general.base_model.0.name")
        return f"give the model that it was made for{f', {name!r}' if name else ''}"

    def _refuse(self, spec: TensorSpec, theirs: TensorSpec | None) -> MismatchError:
        where = (
            "which has no counterpart"
            if theirs is None
            else (f"which does not fit {theirs.name!r} of {list(theirs.shape)}")
        )
        return MismatchError(
            f"{self.path}: tensor {spec.name!r} of the adapter is {list(spec.shape)}, {where} in "
            f"{self._base.path}; {self._remedy()}",
            tensor=spec.name,
            shapes=(spec.shape, None if theirs is None else theirs.shape),
        )

    # -- as an `Adapter` -------------------------------------------------------------------------

    def updates(self) -> Mapping[str, Sequence[Update]]:
        """List what it changes, by GGUF name."""
        return self._updates

    def held_parts(self) -> Mapping[int, int]:
        """Return bytes in memory by the identity of what takes them."""
        return {id(self): count_objects(self._updates)}

    def notes(self) -> Sequence[str]:
        """Say nothing: all of it is used."""
        return ()

    def states(self) -> Sequence[FileState]:
        """Return what the file was when it was opened."""
        return [self._file.state]

    def check_unchanged(self) -> None:
        """Raise FormatError where it was written to since."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def count_objects(updates: Mapping[str, Sequence[Update]]) -> int:
    """Return the bytes that Python's objects for changes take."""
    return 4 * OBJECTS_BYTES * sum(map(len, updates.values()))


def _scale(alpha: float, rank: int) -> float:
    """Return what a product is multiplied by (`llama_adapter_lora_weight::get_scale`)."""
    return alpha / rank if alpha else 1.0
