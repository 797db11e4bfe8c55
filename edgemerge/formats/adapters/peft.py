"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

Names are those of `get_peft_model_state_dict`, and of training tools that save the whole state: with the
adapter's name, or with what a distributed run puts around modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.adapters.config import ADAPTER_CONFIG, AdapterConfig
from edgemerge.formats.adapters.factors import Factor, FactorFile, StoredMatrix
from edgemerge.formats.adapters.forms import Order
from edgemerge.formats.adapters.gguf import count_objects
from edgemerge.formats.adapters.names import BaseNames, Target
from edgemerge.formats.adapters.updates import LowRank, Update
from edgemerge.formats.hub.names import is_unused, name_some, own_name
from edgemerge.formats.hub.safetensors import StoredTensor, read_header
from edgemerge.types import FileState, Source

__all__ = ["DTYPES", "WEIGHTS", "PeftAdapter", "bare_name", "find_weights", "split_factor"]

WEIGHTS = "adapter_model.safetensors"
DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors -> ggml
_AROUND = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?!(weight|bias)$)[^.]+)?(\.(?P<end>weight|bias))?"
)
_SAVED = re.compile(r"\.(modules_to_save(\.(?!(weight|bias)$)[^.]+)?|base_layer)(?=\.)")
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?")


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
        try:
            self._sort(header)
        except BaseException:
            self.close()
            raise

    def _sort(self, header: Mapping[str, StoredTensor]) -> None:
        """Gather what belongs to each module, and make the updates of it."""
        modules: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
        for stored, tensor in header.items():
            name = _AROUND.sub("", stored)
            if ".original_module." in name:
                continue
            module, kind = split_factor(stored)
            if kind:
                modules.setdefault(module, {})[kind] = stored, tensor
            elif match := _TOKENS.fullmatch(name):
                self._replace_tokens(f"{match['module']}.weight", stored, tensor)
            else:
                self._replace(_SAVED.sub("", name), stored, tensor)
        for module, factors in modules.items():
            self._change(module, factors)
        if not self._updates:
            raise FormatError("holds no LoRA; get it again", path=self.path)

    # -- tensors that stand for the base's -------------------------------------------------------

    def _replace(self, name: str, stored: str, tensor: StoredTensor) -> None:
        targets = self._find(name, stored)
        if not targets:
            if is_unused(own_name("llama", name) or name, tensor.dtype):
                self._unused.append(stored)
                return
            raise self._refuse_name(stored)
        for target in targets:
            n_cols = self._n_cols(target)
            matrix = self._matrix(stored, tensor, (target.n_stored, n_cols), target)
            factor = target.replacement(matrix)
            self._file(target.name, Update(target.first, target.n_rows, factor))

    def _replace_tokens(self, name: str, stored: str, tensor: StoredTensor) -> None:
        """Replace the embeddings of some tokens (peft's trainable tokens)."""
        targets, tokens = self._find(name, stored), self._config.tokens()
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
            self._change_experts(stacks, factors, names_of_module)
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

    def _change_experts(
        self,
        stacks: tuple[str, str, str],
        factors: Mapping[str, tuple[str, StoredTensor]],
        names_of_module: tuple[str, str],
    ) -> None:
        """Make the updates of a parameter that holds all experts (peft's `target_parameters`).

        A is (rank * experts, in) with one expert after the other, B (out, rank * experts) with the experts
        next to each other (`ParamWrapper.get_delta_weight`). gate and up are one parameter, one above the
        other or in turn. Before peft 0.18, in and out were the other way round.
        """
        (name_a, a), (name_b, b) = factors["A"], factors["B"]
        gate, up, down = stacks
        spec = self._names.spec(gate)
        assert spec is not None
        n_experts, n_inner, n_outer = spec.shape
        shapes = {(2 * n_inner, n_outer): (gate, up), (n_outer, n_inner): (down,)}
        given = b.shape[0], a.shape[1]
        swapped = given not in shapes and given[::-1] in shapes
        names = shapes.get(given[::-1] if swapped else given)
        if names is None or a.shape[0] % n_experts:
            raise self._refuse_shape(name_b, b.shape, gate, spec.shape)
        rank = a.shape[0] // n_experts
        scale = self._config.scale(names_of_module, rank)
        one = self._matrix(name_a, a, a.shape, None), self._matrix(name_b, b, b.shape, None)
        step = len(names) if self._names.deals_in_turn else 1
        for i, name in enumerate(names):
            n_rows, n_cols = (n_outer, n_inner) if name == down else (n_inner, n_outer)
            first = i if step > 1 else i * n_rows
            for expert in range(n_experts):
                if swapped:
                    left = Factor(one[0], (n_rows, rank), expert * rank, first, step, True)
                    right = Factor(one[1], (rank, n_cols), 0, expert, n_experts, True)
                else:
                    order = Order(step=step)
                    left = Factor(one[1], (n_rows, rank), first, expert, n_experts, order=order)
                    right = Factor(one[0], (rank, n_cols), expert * rank)
                update = Update(expert * n_rows, n_rows, change=LowRank(left, right, scale))
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


def split_factor(stored: str) -> tuple[str, str]:
    """Split a stored name into its module and its kind, as A, B or B_bias; other tensors have none."""
    match = _FACTOR.fullmatch(_AROUND.sub("", stored))
    if match is None:
        return stored, ""
    return match["module"], match["kind"] + ("_bias" if match["end"] == "bias" else "")


def bare_name(module: str) -> str:
    """Return a module's name without what PEFT puts around it."""
    name = own_name("llama", f"{module}.weight") or f"{module}.weight"
    return name.removesuffix(".weight").replace(".base_layer", "")


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
