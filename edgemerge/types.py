"""The data types that wings pass to each other: records, and sizes that follow from them.

Every model is seen through GGUF's eyes. Tensors have GGUF's names (`blk.0.attn_q.weight`) and ggml's types
(`Q4_K`). Shapes are row-major, the reverse of GGUF's on disk. Rows of q and k are in GGUF's rotary order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from edgemerge.experts import Mixture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgemerge.token_rows import RowMap, TokenRule

__all__ = [
    "SUMS",
    "BeginPart",
    "FileState",
    "Float32",
    "Float64",
    "Gradient",
    "InputTensor",
    "ModelInput",
    "Plan",
    "Progress",
    "Recipe",
    "Rule",
    "Setting",
    "Slice",
    "Source",
    "Steps",
    "TensorJob",
    "TensorSpec",
    "UInt8",
    "ignore_parts",
]


if TYPE_CHECKING:
    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]
    UInt8 = NDArray[np.uint8]
else:  # names for annotations: no reason to import NumPy, which `edgemerge --help` does without
    Float32 = Float64 = UInt8 = object

SUMS = ("soft", "full")  # the alignments whose new rows are sums of old ones

Setting: TypeAlias = float | bool | str
Gradient: TypeAlias = tuple[float, ...]  # interpolated over the layers of a slice
Steps: TypeAlias = tuple[bool | str, ...]  # one after the other over the layers of a slice

Progress: TypeAlias = Callable[[int, int], None]
"""Called now and then with bytes done and bytes in all; may raise to stop a merge."""


class BeginPart(Protocol):
    """Called where a part of the work begins that is counted by itself."""

    def __call__(self, label: str, unit: str | None = None, /) -> Progress:
        """Return who is told how far the part is, from any thread; `unit`: of what, if not of bytes."""
        ...


def ignore_parts(_label: str, _unit: str | None = None) -> Progress:
    """Begin a part of which nobody wants to know."""
    return lambda _done, _total: None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and storage of one tensor.

    A row is one contiguous run of `shape[-1]` elements (in_features of a matrix); a vector is one row.
    """

    name: str
    shape: tuple[int, ...]  # row-major
    dtype: str  # ggml type name
    nbytes: int
    like: str = ""  # type that stands for it where types are kept, if not its own

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def n_cols(self) -> int:
        """Elements in one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.nbytes // self.n_rows if self.n_rows else 0


@dataclass(frozen=True, slots=True)
class FileState:
    """A file and what shows that it is still the same; with another state, its bytes may be others."""

    path: Path
    inode: int
    n_bytes: int
    mtime_ns: int


class Source(Protocol):
    """A model on disk that can be read by rows. Reading is thread-safe (`pread`)."""

    path: Path
    architecture: str  # GGUF's general.architecture, e.g. "llama"

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name, in the order in which GGUF lists them."""

    def metadata(self) -> Mapping[str, bytes]:
        """GGUF key -> typed value as GGUF encodes it (see `edgemerge.formats.gguf.metadata`)."""

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` ((stop - start) * row_bytes,) with rows [start, stop) of a tensor, as stored."""

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Drop a tensor's pages, or those of its first rows, from the page cache; a hint.

        Files that were nearly all there when they were opened stay.
        """

    def notes(self) -> Sequence[str]:
        """Say what of the model is not used, or was read otherwise than it says; one sentence each."""

    def work_bytes(self) -> int:
        """Bytes that each thread takes to read rows, beside those that it reads into."""

    def states(self) -> Sequence[FileState]:
        """Return what the files of the tensors were when they were opened."""

    def check_unchanged(self) -> None:
        """Raise FormatError where one of these files was written to since."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of a parameter: a value for the tensors whose name contains `filter` (None: all)."""

    value: Setting | Gradient | Steps
    filter: str | None = None


Parameters: TypeAlias = Mapping[str, tuple[Rule, ...]]


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One model of a slice, and what the recipe says about it there."""

    path: Path
    layer_range: tuple[int, int] | None = None  # half-open; None: all layers
    parameters: Parameters = field(default_factory=dict)
    imatrix: Path | None = None  # importance matrix of this model, to weight it by


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive output layers that are merged from the same models."""

    inputs: tuple[ModelInput, ...]
    parameters: Parameters = field(default_factory=dict)
    base: Path | None = None  # instead of the recipe's


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge, as checked by `edgemerge.recipe.recipe`; never changed afterwards.

    Paths of models are absolute. A relative path is the name of one of the stages, whose output does not
    exist yet.
    """

    method: str
    base: Path | None
    slices: tuple[Slice, ...]
    parameters: Parameters = field(default_factory=dict)
    defaults: Parameters = field(default_factory=dict)  # asked last, before the method's own
    out_format: str = "gguf"  # or "hf", a Hugging Face directory
    out_type: str | None = None  # file type, "keep", or None for the default
    dtype: str | None = None  # mergekit's working type; float32 and float64 make F32 the default
    tensor_types: tuple[tuple[str, str], ...] = ()  # pattern of names -> ggml type
    imatrix: Path | None = None  # importance matrix that guides the encoders
    memory: int | None = None  # bytes
    seed: int = 0
    align: str | None = None  # hard, soft, full or off; None: the method's own choice
    neurons: bool = False  # match feed-forward neurons too, for models trained apart
    tokenizer_source: str | None = None  # base, union or a path; None: the base's, rows by number
    tokens: Mapping[str, TokenRule] = field(
        default_factory=dict
    )  # added, or with rows of their own
    pad_to_multiple_of: int | None = None  # rows of the vocabulary
    chat_template: str | None = None  # Jinja text; None: the tokenizer source's own; or auto
    notes: tuple[str, ...] = ()  # what the user should know about how the request was read
    name: str | None = None  # of a stage
    stages: tuple[Recipe, ...] = ()  # merges that are done first, in this order
    mixture: Mixture | None = None  # the one model, `MIXTURE_PATH`, is made of these

    @property
    def title(self) -> str:
        """The method, or mixture."""
        return self.method if self.mixture is None else "mixture"

    @property
    def matches_neurons(self) -> bool:
        """Whether neurons are matched: asked for by themselves, or in a full alignment."""
        return self.neurons or self.align == "full"

    def models(self) -> tuple[Path, ...]:
        """Every distinct model in the order of its first mention, the base first."""
        paths = [self.base]
        for part in self.slices:
            paths += [part.base, *(model.path for model in part.inputs)]
        return tuple(dict.fromkeys(path for path in paths if path is not None))

    def base_of(self, part: Slice) -> Path | None:
        """Return the base of a slice: its own, or the recipe's."""
        return part.base or self.base

    def inputs(self) -> tuple[Path, ...]:
        """Every file or folder that a merge reads: the models, and the importance matrices."""
        models = [path for path in self.models() if path.is_absolute()]
        models += self.mixture.models() if self.mixture is not None else ()
        source = Path(self.tokenizer_source or "base")
        models += [source] if source.is_absolute() else []
        models += [path for stage in self.stages for path in stage.inputs()]
        matrices = [model.imatrix for part in self.slices for model in part.inputs]
        found = dict.fromkeys((*models, *matrices, self.imatrix))
        return tuple(path for path in found if path is not None)


@dataclass(frozen=True, slots=True)
class InputTensor:
    """One model's tensor for one output tensor."""

    model: int  # index in Plan.models
    spec: TensorSpec
    settings: Mapping[str, Setting] = field(default_factory=dict)  # per-model parameters, resolved
    imatrix: Path | None = None  # that has importances of its columns, if these weight it


class StoredChange(Protocol):
    """How a file has other values than GGUF: see `edgemerge.formats.hub.changes`."""

    def undo(self, rows: NDArray[np.float32], first: int) -> None:
        """Turn rows of GGUF, (n_rows, n_cols) from number `first` on, into stored ones."""


@dataclass(frozen=True, slots=True)
class TensorJob:
    """All that is needed to make one output tensor."""

    out: TensorSpec
    method: str
    base: InputTensor | None
    experts: tuple[InputTensor, ...]
    settings: Mapping[str, Setting]  # global parameters, resolved for this tensor
    rows_per_block: int
    passes: int  # how often the inputs are read, but for cached blocks
    is_copy: bool = False  # of its only input, which may be stored as another type
    is_weighted: bool = False  # encoded by the importance matrix
    rows: RowMap | None = None  # of a tensor of tokens, where not all inputs have the output's
    change: StoredChange | None = None  # of what is stored, where its values are not GGUF's
    workers: int = 1  # that make its blocks; more than one where it is much of the model
    cached_blocks: int = 0  # blocks that each worker keeps in memory from one pass to the next
    depth: float = 0.0  # 0 before and in the first layer, 1 in and after the last

    @property
    def name(self) -> str:
        """GGUF name of the output tensor."""
        return self.out.name

    @property
    def n_cols(self) -> int:
        """Elements in one row of the output tensor."""
        return self.out.n_cols

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Base (if any) and experts: everything that is read."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def n_blocks(self) -> int:
        """Blocks of rows that the tensor is cut into."""
        return -(-self.out.n_rows // max(1, self.rows_per_block))

    @property
    def read_bytes(self) -> int:
        """Bytes that are read from the inputs, all passes together."""
        cached_rows = min(self.out.n_rows, self.workers * self.cached_blocks * self.rows_per_block)
        n_rows = self.passes * self.out.n_rows - (self.passes - 1) * cached_rows
        return n_rows * sum(tensor.spec.row_bytes for tensor in self.inputs)

    @property
    def is_byte_copy(self) -> bool:
        """Whether the stored bytes of the only input are the output's, without arithmetic."""
        is_same = self.is_copy and self.experts[0].spec.dtype == self.out.dtype
        return is_same and self.change is None and not (self.rows and self.rows.n_padding)


@dataclass(frozen=True, slots=True)
class Plan:
    """A merge, decided to the last byte before any tensor data is read."""

    recipe: Recipe
    models: tuple[Path, ...]
    jobs: tuple[TensorJob, ...]  # in the order of the output file
    metadata: Mapping[str, bytes]  # of the output, without the provenance section
    file_type: str
    budget: int  # bytes, for the whole process
    workers: int
    arena_bytes: int  # of one worker
    needed_bytes: int  # of the budget: the process, headers, and all arenas
    align: str  # hard, soft, full or off
    alignment_bytes: int  # read to align heads, before the merge
    notes: tuple[str, ...]
    stages: tuple[Plan, ...] = ()  # of the recipe's stages

    @property
    def reorders(self) -> bool:
        """Whether heads or neurons of experts are brought into another order."""
        return self.align != "off" or self.recipe.matches_neurons

    @property
    def read_bytes(self) -> int:
        """Bytes that will be read from the inputs, all passes together."""
        return self.alignment_bytes + sum(job.read_bytes for job in self.jobs)

    @property
    def written_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(job.out.nbytes for job in self.jobs)

    @property
    def n_elements(self) -> int:
        """Elements of the output."""
        return sum(job.out.n_elements for job in self.jobs)
