"""What a merge method is: one record, which planning, compiling, help and documentation read.

To add a method, write its record in the file of its family and list that in `edgemerge.methods.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from edgemerge.errors import RecipeError
from edgemerge.methods.blocks import Block, BlockStream
from edgemerge.methods.parameters import Parameter
from edgemerge.types import Float32, Float64, InputTensor, Setting, TensorJob

__all__ = ["Described", "Method", "WorkingMemory", "always", "check_weights"]

TINY_WEIGHT = 1e-8


class Described(Protocol):
    """What a method must know of an output tensor to plan it."""

    @property
    def name(self) -> str:
        """GGUF name in the output."""

    @property
    def n_cols(self) -> int:
        """Elements in one row."""

    @property
    def base(self) -> InputTensor | None:
        """The base's tensor, where the method uses one."""

    @property
    def experts(self) -> tuple[InputTensor, ...]:
        """The models' tensors, each with its own settings."""

    @property
    def settings(self) -> Mapping[str, Setting]:
        """Settings of the merge."""


class WorkingMemory(NamedTuple):
    """Bytes that a method takes by `BlockStream.take`, beside the decoded inputs.

    The plan adds `SUM_LANES` float64, and the alignment of eight arrays for each input.
    """

    fixed: int = 0
    per_row: int = 0  # of the block at hand


def _one_pass(tensor: Described) -> int:
    return 1


def _no_memory(job: TensorJob) -> WorkingMemory:
    return WorkingMemory()


def _no_kernels(tensor: Described) -> Sequence[str]:
    return ()


def _no_sides(tensor: Described) -> Sequence[int]:
    return ()


def _no_products(job: TensorJob) -> float:
    return 0.0


def _accept(tensor: Described) -> None:
    pass


def _never(tensor: Described) -> bool:
    return False


def always(tensor: Described) -> bool:
    """Say yes for every tensor."""
    return True


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method.

    Attributes
    ----------
    name, summary, source : str
        Name in a recipe, what the method does in a few words, and the paper or program it is from.
    parameters : sequence of Parameter
        With the method's own defaults.
    kernels : sequence of str
        FILE.KERNEL of all kernels that `blocks` may call, and `linear.subtract` for task vectors.
    blocks : callable
        Generator: takes a `BlockStream`, yields every block with its merged values (n,) float32 in row
        order. All that spans blocks (a k-th magnitude, a norm) is surveyed first, over the same blocks.
        The result must not depend on the height of blocks: sum rows in order, hash the flat index.
    needs_base : bool
        Whether there must be a base, which is then `Block.base`.
    takes_base : bool
        Whether a base is used where the recipe names one. It need not.
    merges_base : bool
        Whether a base that the recipe names is one more model, as for mergekit's methods without a base.
    n_models : (int, int or None)
        Least and most models, the base not counted.
    align : str
        What is done about attention heads unless the recipe says otherwise: hard, soft or off.
    passes : callable
        Tells how often `blocks` asks for the blocks of a tensor.
    memory : callable
        Tells how much working memory `blocks` takes for a tensor.
    decomposes : callable
        Tells the sides of all symmetric matrices that `blocks` decomposes for a tensor, which takes their
        cubes in time; those of a calibration are not counted.
    multiplies : callable
        Tells how many products `blocks` adds up for a tensor, where each element takes many: a product of two
        float64 counts three times.
    check : callable
        Raises `RecipeError` for settings that a tensor cannot be merged with.
    takes_deltas : callable
        Whether `Block.experts` are task vectors, expert - base, instead of the models' own values.
    keeps_non_finite : callable
        Whether infinity or NaN in an input is sure to make the result infinite or NaN in that place.
    copies : callable
        Whether the result is the only model's tensor as it is.
    reads_importances : callable
        Whether each model's importance matrix is needed, for the tensors that it has.
    spans_layer : callable
        Whether a tensor's result depends on its whole layer. Then `measure` runs first, on each tensor.
    more_kernels : callable
        Tells which kernels beside `kernels` a tensor's settings ask for. Only such merges compile them.
    measure : callable, optional
        Takes a `BlockStream` and returns an array; the sum over a layer is `BlockStream.layer_sum`.
    refuses : mapping
        Switches of other methods that would make nonsense of this one -> a sentence that says why.
    presets : mapping
        Name of a preset -> published settings.
    """

    name: str
    summary: str
    source: str
    parameters: Sequence[Parameter]
    kernels: Sequence[str]
    blocks: Callable[[BlockStream], Iterator[tuple[Block, Float32]]]
    needs_base: bool = False
    takes_base: bool = False
    merges_base: bool = False
    n_models: tuple[int, int | None] = (1, None)
    align: str = "off"
    passes: Callable[[Described], int] = _one_pass
    memory: Callable[[TensorJob], WorkingMemory] = _no_memory
    decomposes: Callable[[Described], Sequence[int]] = _no_sides
    multiplies: Callable[[TensorJob], float] = _no_products
    check: Callable[[Described], None] = _accept
    takes_deltas: Callable[[Described], bool] = _never
    keeps_non_finite: Callable[[Described], bool] = _never
    copies: Callable[[Described], bool] = _never
    reads_importances: Callable[[Described], bool] = _never
    spans_layer: Callable[[Described], bool] = _never
    more_kernels: Callable[[Described], Sequence[str]] = _no_kernels
    measure: Callable[[BlockStream], Float64] | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict)

    def uses_base(self, base: Path | None) -> bool:
        """Tell whether the base that a recipe names, or None, is `Block.base`."""
        return self.needs_base or (self.takes_base and base is not None)

    def parameters_of(self, *, model: bool) -> dict[str, Parameter]:
        """Return the parameters that each model has, or those of the merge, by name."""
        return {p.name: p for p in self.parameters if p.of_model == model}

    def defaults(self, *, model: bool) -> dict[str, Setting]:
        """Return the defaults that there are, by name."""
        return {
            name: parameter.default
            for name, parameter in self.parameters_of(model=model).items()
            if parameter.default is not None
        }


def check_weights(tensor: Described, remedy: str) -> None:
    """Refuse weights that cannot be normalised.

    Raises
    ------
    RecipeError
        They sum to zero; the message ends with the remedy.
    """
    total = sum(float(expert.settings["weight"]) for expert in tensor.experts)
    if abs(total) < TINY_WEIGHT:
        raise RecipeError(
            f"the weights of {tensor.name} sum to zero, which cannot be normalised; {remedy}",
            field="weight",
        )
