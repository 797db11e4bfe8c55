"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.adapters.config import ADAPTER_CONFIG, UNFOLD, AdapterConfig
from edgemerge.formats.adapters.expert_parameters import ExpertFactors, Stacks, find_order
from edgemerge.formats.adapters.factors import Factor, FactorFile, StoredMatrix
from edgemerge.formats.adapters.forms import Order
from edgemerge.formats.adapters.gguf import count_objects
from edgemerge.formats.adapters.names import BaseNames, Target
from edgemerge.formats.adapters.peft_names import (
    bare_name,
    check_is_one,
    module_of_tokens,
    second_adapter,
    split_factor,
    split_saved,
    unwrap,
)
from edgemerge.formats.adapters.updates import LowRank, Update
from edgemerge.formats.hub.names import is_unused, name_some, own_name
from edgemerge.formats.hub.safetensors import StoredTensor, read_header
from edgemerge.types import FileState, Source

__all__ = ["DTYPES", "WEIGHTS", "PeftAdapter", "find_weights"]

WEIGHTS = "adapter_model.safetensors"
DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors -> ggml


class PeftAdapter:
    """A PEFT directory, fitted to a base.

    Parameters
    ----------
    path : Path
        The directory.
    base : Source
        Open.

    Raises
    ------
    FormatError
        The directory is incomplete or damaged, or of a kind that is not read.
    MismatchError
        It was made for another base.
    """

    def __init__(self, path: Path, base: Source) -> None:
        self.path = path
        self._config = AdapterConfig(path)
        self._base, self._names = base, BaseNames(base)
        header = read_header(find_weights(path))
        self._files = [FactorFile(path / ADAPTER_CONFIG), FactorFile(find_weights(path))]
        self._updates: dict[str, list[Update]] = {}
        self._unused: list[str] = []
        self._saved: dict[str, str] = {}  # what is saved whole -> name of the adapter
        self._experts: list[tuple[ExpertFactors, float]] = []  # with their scales
        try:
            self._sort(header)
        except BaseException:
            self.close()
            raise

    def _sort(self, header: Mapping[str, StoredTensor]) -> None:
        """Gather what belongs to each module, and make the updates of it."""
        check_is_one(header, self.path)
        modules: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
        for stored, tensor in header.items():
            if ".original_module." in unwrap(stored):
                continue
            module, kind = split_factor(stored)
            if kind:
                modules.setdefault(module, {})[kind] = stored, tensor
            elif (module_of := module_of_tokens(stored)) is not None:
                self._replace_tokens(module_of, stored, tensor)
            else:
                self._replace(stored, tensor)
        for module, factors in modules.items():
            self._change(module, factors)
        self._change_experts()
        if not self._updates:
            raise FormatError("holds no LoRA; get it again", path=self.path)

    # -- tensors that stand for the base's -------------------------------------------------------

    def _replace(self, stored: str, tensor: StoredTensor) -> None:
        name, adapter = split_saved(stored)
        targets = self._find(name, stored)
        if not targets:
            if is_unused(own_name("llama", name) or name, tensor.dtype):
                self._unused.append(stored)
                return
            raise self._refuse_name(stored)
        if adapter and self._saved.setdefault(name, adapter) != adapter:
            raise second_adapter(stored, self.path)
        for target in targets:
            n_cols = self._n_cols(target)
            matrix = self._matrix(stored, tensor, (target.n_stored, n_cols), target)
            factor = target.replacement(matrix)
            self._file(target.name, Update(target.first, target.n_rows, factor))

    def _replace_tokens(self, module: str, stored: str, tensor: StoredTensor) -> None:
        """Replace the embeddings of some tokens (peft's trainable tokens)."""
        targets, tokens = self._find(f"{module}.weight", stored), self._config.tokens(module)
        if not targets or tensor.shape[:1] != (len(tokens),):
            raise self._refuse_name(stored)
        for target in targets:
            matrix = self._matrix(stored, tensor, (len(tokens), self._n_cols(target)), target)
            for i, token in enumerate(tokens):
                if token >= target.n_rows:
                    raise FormatError(
                        f"trains token {token}, and the base has {target.n_rows}; {self._remedy()}",
                        path=self.path,
                        tensor=stored,
                    )
                factor = Factor(matrix, (1, matrix.shape[1]), row=i, change=target.change)
                self._file(target.name, Update(token, 1, factor))

    # -- factors ---------------------------------------------------------------------------------

    def _change(self, module: str, factors: Mapping[str, tuple[str, StoredTensor]]) -> None:
        """Make the updates of one module's A and B."""
        is_embedding = "embedding_A" in factors or "embedding_B" in factors
        names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
        missing = [kind for kind in names if kind not in factors]
        if missing:
            stored = next(iter(factors.values()))[0]
            raise FormatError(
                f"stands without lora_{missing[0]}; get the adapter again",
                path=self.path,
                tensor=stored,
            )
        (name_a, a), (name_b, b) = (factors[kind] for kind in names)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise FormatError(
                f"is {list(a.shape)}, which is no A for the B of {list(b.shape)}; it was saved before "
                "its parts were gathered, or is damaged",
                path=self.path,
                tensor=name_a,
            )
        names_of_module = (module, bare_name(module))
        magnitude = factors.get("magnitude_vector")
        stacks = None if is_embedding else self._names.stacks(module.replace(".base_layer", ""))
        targets = self._find(f"{module}.weight", name_a)
        if stacks is not None and not targets:
            self._add_experts(stacks, factors, names_of_module)
            return
        if not targets:
            raise self._refuse_name(name_a)
        scale = self._config.scale(names_of_module, a.shape[0])
        for target in targets:
            update = Update(target.first, target.n_rows)
            n_rows, n_cols, rank = target.n_stored, self._n_cols(target), a.shape[0]
            if is_embedding:  # the change is (B A)^T: a row per token, a column of A
                left = self._matrix(name_a, a, (rank, n_rows), target)
                right = self._matrix(name_b, b, (n_cols, rank), target)
                rows = Factor(left, (n_rows, rank), transposed=True, change=target.factors)
                columns = Factor(right, (rank, n_cols), transposed=True)
            else:
                left = self._matrix(name_b, b, (n_rows, rank), target)
                right = self._matrix(name_a, a, (rank, n_cols), target)
                rows = target.addend(left)
                columns = Factor(right, (rank, n_cols), order=Order(places=target.order.places))
            update = replace(update, change=LowRank(rows, columns, scale))
            if magnitude is not None:
                update = replace(
                    update, magnitude=self._magnitude(magnitude, target, n_rows, module)
                )
            self._file(target.name, update)
        if "B_bias" in factors:
            self._add_bias(module, *factors["B_bias"], scale)

    def _magnitude(
        self, magnitude: tuple[str, StoredTensor], target: Target, n_rows: int, module: str
    ) -> Factor:
        stored, tensor = magnitude
        if target.name == "token_embd.weight":
            raise FormatError(
                "is DoRA's of an embedding, whose columns it scales by norms over the whole vocabulary; "
                "merge it in peft (merge_and_unload), and give the result",
                path=self.path,
                tensor=stored,
            )
        matrix = self._matrix(stored, tensor, (n_rows, 1), target)
        return target.addend(matrix)

    def _add_bias(self, module: str, stored: str, tensor: StoredTensor, scale: float) -> None:
        targets = self._find(f"{module}.bias", stored)
        if not targets:
            raise FormatError(
                "is a bias of LoRA's own (lora_bias), and the base has none there to add it to, so that "
                "the two cannot be one model; train without lora_bias",
                path=self.path,
                tensor=stored,
            )
        for target in targets:
            matrix = self._matrix(stored, tensor, (target.n_stored, 1), target)
            factor = target.addend(matrix)
            self._file(target.name, Update(target.first, target.n_rows, added=(factor, scale)))

    def _add_experts(
        self,
        stacks: Stacks,
        factors: Mapping[str, tuple[str, StoredTensor]],
        names_of_module: tuple[str, str],
    ) -> None:
        """Keep A and B of a parameter that holds all experts, until all of them are known."""
        (name_a, a), (name_b, b) = factors["A"], factors["B"]
        one = self._matrix(name_a, a, a.shape, None), self._matrix(name_b, b, b.shape, None)
        parameter = ExpertFactors(stacks, *one)
        if not parameter.names:
            raise self._refuse_shape(name_b, b.shape, stacks.gate, stacks.shape)
        self._experts.append((parameter, self._config.scale(names_of_module, parameter.rank)))

    def _change_experts(self) -> None:
        """Make the updates of parameters that hold all experts (peft's `target_parameters`)."""
        order = find_order([parameter for parameter, _ in self._experts])
        for parameter, scale in self._experts:
            swapped = order if parameter.is_swapped is None else parameter.is_swapped
            if swapped is None:
                raise FormatError(
                    "is of experts that are as wide as high, and no other tensor tells which side is in "
                    f"(versions of peft differ); {UNFOLD}",
                    path=self.path,
                    tensor=parameter.b.name,
                )
            in_turn = self._names.deals_in_turn
            for name, update in parameter.updates(scale, swapped=swapped, in_turn=in_turn):
                self._file(name, update)

    # -- small parts -----------------------------------------------------------------------------

    def _find(self, name: str, stored: str) -> tuple[Target, ...]:
        """Find what a stored name is; refuse what GGUF has in a way that nobody knows."""
        targets = self._names.find(name)
        for target in targets:
            if target.is_lost:
                raise MismatchError(
                    f"{self.path}: tensor {stored!r} of the adapter cannot be added: no GGUF of "
                    f"{self._base.architecture} states by which factors or in which order "
                    f"{target.name!r} was converted; give the directory that the base was made from",
                    tensor=stored,
                )
        return targets

    def _n_cols(self, target: Target) -> int:
        spec = self._names.spec(target.name)
        assert spec is not None
        return 1 if len(spec.shape) == 1 else spec.n_cols

    def _matrix(
        self,
        stored: str,
        tensor: StoredTensor,
        shape: Sequence[int],
        target: Target | None,
    ) -> StoredMatrix:
        """Describe a stored tensor, which must have the shape that the base makes it."""
        if tensor.dtype not in DTYPES:
            raise FormatError(
                f"its type {tensor.dtype} is not one of {', '.join(DTYPES)}; save the adapter in one of "
                "these",
                path=self.path,
                tensor=stored,
            )
        if target is not None and target.matrix_shape(tensor.shape, shape) != tuple(shape):
            spec = self._names.spec(target.name)
            assert spec is not None
            raise self._refuse_shape(stored, tensor.shape, target.name, spec.shape)
        n_rows, n_cols = shape
        return self._files[1].matrix(stored, DTYPES[tensor.dtype], (n_rows, n_cols), tensor.offset)

    def _file(self, name: str, update: Update) -> None:
        found = self._updates.setdefault(name, [])
        for i, known in enumerate(found):
            if known.first == update.first and known.n_rows == update.n_rows:
                found[i] = _join(known, update)
                return
        found.append(update)

    def _remedy(self) -> str:
        name = self._config.base_name
        return f"give the model that it was made for{f', {name!r}' if name else ''}"

    def _refuse_name(self, stored: str) -> MismatchError:
        return MismatchError(
            f"{self.path}: tensor {stored!r} of the adapter has no counterpart in {self._base.path}; "
            f"{self._remedy()}",
            tensor=stored,
        )

    def _refuse_shape(
        self, stored: str, shape: Sequence[int], name: str, theirs: Sequence[int]
    ) -> MismatchError:
        return MismatchError(
            f"{self.path}: tensor {stored!r} of the adapter is {list(shape)}, which does not fit "
            f"{name!r} of {list(theirs)} in {self._base.path}; {self._remedy()}",
            tensor=stored,
            shapes=(tuple(shape), tuple(theirs)),
        )

    # -- as an `Adapter` -------------------------------------------------------------------------

    def held_parts(self) -> Mapping[int, int]:
        """Return bytes in memory by the identity of what takes them."""
        return {id(self): count_objects(self._updates)}

    def updates(self) -> Mapping[str, Sequence[Update]]:
        """List what it changes, by GGUF name."""
        return self._updates

    def notes(self) -> Sequence[str]:
        """Say which of its tensors are not used, and whether it names another base."""
        name, notes = self.path.name, list[str]()
        if self._unused:
            notes.append(
                f"{name}: tensors that the language model does not use are left out: "
                f"{name_some(self._unused)}"
            )
        wanted = self._config.base_name
        if wanted is not None and not self._names.is_called(wanted):
            notes.append(
                f"{name} was made for {wanted!r}, and its shapes fit {self._base.path.name}; see that "
                "this is the same model"
            )
        return notes

    def states(self) -> Sequence[FileState]:
        """Return what its files were when they were opened."""
        return [file.state for file in self._files]

    def check_unchanged(self) -> None:
        """Raise FormatError where one of its files was written to since."""
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _join(left: Update, right: Update) -> Update:
    """Make one update of two of the same rows, as of a saved embedding and its LoRA."""
    return Update(
        left.first,
        left.n_rows,
        left.replacement or right.replacement,
        left.added or right.added,
        left.change or right.change,
        left.magnitude or right.magnitude,
    )


def find_weights(path: Path) -> Path:
    """Return the file of an adapter's tensors.

    Raises
    ------
    FormatError
        There is none, or only pickle.
    """
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    pickles = sorted(p.name for s in ("*.bin", "*.pt") for p in path.glob(s))
    if pickles:
        raise FormatError(
            f"holds its factors as pickle only ({pickles[0]}), which is never read because it can run "
            "code; save the adapter as safetensors",
            path=path,
        )
    raise FormatError(f"has no {WEIGHTS}; get it too", path=path)
