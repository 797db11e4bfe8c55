"""Which output tensors there are, what each is made from, and with which parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from edgemerge.errors import FormatError, MismatchError, RecipeError
from edgemerge.finding.cache import folder_name
from edgemerge.formats.architectures import hf_name, layer_index
from edgemerge.formats.constants import is_constant
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.types import row_bytes
from edgemerge.methods.method import Method
from edgemerge.planning.compatibility import (
    find_head,
    find_tensor,
    is_scale,
    missing_tensor,
    same_scale,
    same_shape,
    same_width,
)
from edgemerge.planning.heads import needs_head
from edgemerge.planning.token_maps import PER_TOKEN, TokenMaps
from edgemerge.planning.vocabulary import (
    EMBEDDING,
    OUTPUT,
    Vocabulary,
    has_rows_of_tokens,
)
from edgemerge.recipe.parameters import look_up
from edgemerge.token_rows import RowMap
from edgemerge.types import (
    InputTensor,
    ModelInput,
    Parameters,
    Recipe,
    Setting,
    Slice,
    Source,
    TensorSpec,
)

__all__ = ["Draft", "draft_jobs", "find_depths", "hugging_face_names", "list_experts", "may_copy"]


@dataclass(frozen=True, slots=True)
class Draft:
    """A job before types and block heights are known."""

    name: str  # in the output
    base: InputTensor | None
    experts: tuple[InputTensor, ...]
    settings: Mapping[str, Setting]
    is_constant: bool = False  # taken over as it is
    rows: RowMap | None = None  # `TensorJob.rows`

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """Base (if any) and experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def reference(self) -> TensorSpec:
        """The input whose type the output follows, in the output's shape."""
        spec = self.inputs[0].spec
        if spec.like:
            nbytes = spec.n_rows * row_bytes(spec.like, spec.n_cols)
            spec = replace(spec, dtype=spec.like, nbytes=nbytes, like="")
        if self.rows is None:
            return spec
        n_rows = self.rows.n_rows
        return replace(spec, shape=(n_rows, *spec.shape[1:]), nbytes=n_rows * spec.row_bytes)

    @property
    def n_cols(self) -> int:
        """Elements in one row."""
        return self.reference.n_cols


def list_experts(part: Slice, base: Path | None, method: Method) -> list[ModelInput]:
    """List a slice's models: without the base's own entry where the method has a base.

    Where a base is one more model of `models`, it comes last; slices name all of theirs (mergekit plan.py).
    """
    if method.uses_base(base):
        return [model for model in part.inputs if model.path != base]
    models = list(part.inputs)
    is_listed = base in {model.path for model in models} or models[0].layer_range is not None
    if method.merges_base and base is not None and not is_listed:
        models.append(ModelInput(base))
    return models


def draft_jobs(
    recipe: Recipe,
    method: Method,
    models: tuple[Path, ...],
    sources: Mapping[Path, Source],
    vocabulary: Vocabulary,
) -> Iterator[Draft]:
    """Yield the output's tensors in its order: what precedes the layers, the layers, the rest.

    Parameters
    ----------
    recipe : Recipe
        What is wanted.
    method : Method
        The recipe's.
    models : tuple of Path
        All models, as `Plan.models` lists them.
    sources : mapping of Path to Source
        The same models, open.
    vocabulary : Vocabulary
        The output's.

    Raises
    ------
    RecipeError, FormatError, MismatchError
        A parameter or a layer range is wrong, or the models do not fit together.
    """
    maps = TokenMaps(vocabulary, recipe.tokens, [sources[path] for path in models])
    parts = [_Part(recipe, method, part, models, sources, maps) for part in recipe.slices]
    names = list(parts[0].reference.specs())
    used = dict.fromkeys(model.path for part in parts for model in part.models)
    head = needs_head([sources[path] for path in used], stacked=len(parts) > 1)
    if head and OUTPUT not in names:
        names.append(OUTPUT)
    elif head is False and OUTPUT in names:
        names.remove(OUTPUT)
    layers = [layer for name in names if (layer := layer_index(name)) is not None]
    first = next((i for i, name in enumerate(names) if layer_index(name) is not None), len(names))
    for name in names[:first]:
        yield _part_of(name, parts).draft(name, name, 0)
    if len(parts) == 1 and parts[0].is_whole(max(layers, default=-1) + 1):
        # The usual merge: the base's own order, which for GGUF inputs need not go layer by layer.
        for name in names[first:]:
            yield parts[0].draft(name, name, layer_index(name) or 0)
        _refuse_extra(parts[0], set(names))
        return
    n_done = 0
    for part in parts:
        _refuse_extra_in_slice(part, {name for name in names if layer_index(name) is None})
        for offset in range(part.n_layers):
            for stem in part.stems(offset):
                yield part.draft(f"blk.{n_done}.{stem}", stem, offset)
            n_done += 1
    for name in names[first:]:
        if layer_index(name) is None:
            yield _part_of(name, parts).draft(name, name, 0)


def _part_of(name: str, parts: Sequence[_Part]) -> _Part:
    """Choose the slice of a tensor outside the layers: the first for embeddings, the last for the rest."""
    return parts[0] if _precedes_layers(name) else parts[-1]


def _precedes_layers(name: str) -> bool:
    return name.split(".")[0].endswith(("_embd", "_embd_norm", "_types"))


def find_depths(names: Sequence[str]) -> dict[str, float]:
    """Tell how deep each output tensor lies: 0 in the first layer, 1 in the last, linearly between.

    Embeddings lie at 0, all else outside the layers at 1, as does the only layer of a model that has one.
    """
    layers = {name: layer_index(name) for name in names}
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    depths = {}
    for name, layer in layers.items():
        if layer is None:
            depths[name] = 0.0 if _precedes_layers(name) else 1.0
        else:
            depths[name] = layer / last if last else 1.0
    return depths


def _refuse_extra(part: _Part, known: set[str]) -> None:
    """Refuse a tensor that only an expert has, as it would be lost silently."""
    for model in part.models:
        for name in part.sources[model.path].specs():
            if name not in known and not is_constant(name) and name != OUTPUT:
                raise missing_tensor(name, part.reference, part.sources[model.path])


def _refuse_extra_in_slice(part: _Part, known: set[str]) -> None:
    """Do the same where only some layers are taken; `known` are the tensors outside the layers."""
    for i, model in enumerate(part.models):
        for name in part.sources[model.path].specs():
            outside = layer_index(name) is None
            if outside and name not in known and not is_constant(name) and name != OUTPUT:
                raise missing_tensor(name, part.reference, part.sources[model.path])
        for offset in range(part.n_layers):
            for stem in sorted(set(part.stems(offset, i)) - set(part.stems(offset))):
                name = f"blk.{part.starts[i] + offset}.{stem}"
                if not is_constant(name):
                    raise missing_tensor(name, part.reference, part.sources[model.path])


class _Part:
    """One slice, with its models open and its layers counted."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        part: Slice,
        models: tuple[Path, ...],
        sources: Mapping[Path, Source],
        maps: TokenMaps,
    ) -> None:
        self.recipe, self.method, self.slice = recipe, method, part
        self.sources, self.maps = sources, maps
        self.indices = {path: i for i, path in enumerate(models)}
        base = recipe.base_of(part)
        self.experts = list_experts(part, base, method)
        self.base = self._base() if method.uses_base(base) else None
        self.models = ([self.base] if self.base else []) + self.experts
        self.reference = sources[self.models[0].path]
        ranges = [self._range(model) for model in self.models]
        self.starts = [start for start, _ in ranges]
        self._known_settings: dict[str, dict[str, Setting]] = {}
        self._is_hugging_face: dict[str, bool] = {}  # of a filter's text
        self.n_layers = ranges[0][1] - ranges[0][0]
        self.positions = [
            offset / (self.n_layers - 1) if self.n_layers > 1 else 1.0
            for offset in range(self.n_layers)
        ]

    def _base(self) -> ModelInput:
        """Return the base's own entry in the slice, else the base with the first model's layers."""
        base = self.recipe.base_of(self.slice)
        assert base is not None
        for model in self.slice.inputs:
            if model.path == base:
                return model
        return ModelInput(base, self.experts[0].layer_range)

    def _range(self, model: ModelInput) -> tuple[int, int]:
        source = self.sources[model.path]
        count = get_value(source.metadata(), f"{source.architecture}.block_count")
        if not isinstance(count, int):
            raise FormatError(
                f"states no {source.architecture}.block_count; convert the model anew",
                path=model.path,
            )
        start, stop = model.layer_range or (0, count)
        if stop > count:
            raise RecipeError(
                f"layer_range [{start}, {stop}] goes past the {count} layers of {model.path}",
                field="layer_range",
            )
        return start, stop

    def is_whole(self, n_layers: int) -> bool:
        """Tell whether every model gives all of its layers, in place."""
        return set(self.starts) == {0} and self.n_layers >= n_layers

    def stems(self, offset: int, i_model: int = 0) -> list[str]:
        """List what a model has in one layer, without its `blk.N.`; by default the reference."""
        prefix = f"blk.{self.starts[i_model] + offset}."
        specs = self.sources[self.models[i_model].path].specs()
        return [name.removeprefix(prefix) for name in specs if name.startswith(prefix)]

    def draft(self, name: str, tensor: str, offset: int) -> Draft:
        """Collect one output tensor; `tensor` is a stem inside a layer or a whole name."""
        if is_constant(name):
            found = self._input(0, self._source_name(0, name, tensor, offset))
            return Draft(name, None, (found,), {"scale": 1.0}, is_constant=True)
        names = [self._source_name(i, name, tensor, offset) for i in range(len(self.models))]
        inputs = [self._input(i, source_name) for i, source_name in enumerate(names)]
        rows = self._map_rows(name, inputs)
        for model, other in zip(self.models[1:], inputs[1:], strict=True):
            source = self.sources[model.path]
            if rows is None:
                same_shape(inputs[0].spec, other.spec, self.reference, source)
            if is_scale(name, self.reference):
                same_scale(names[0], self.reference, other.spec.name, source)
        if is_scale(
            name, self.reference
        ):  # equal in all models, and no weight that settings could scale
            return Draft(name, None, (inputs[0],), {"scale": 1.0}, is_constant=True)
        position = self.positions[offset] if layer_index(name) is not None else 0.0
        n_bases = 1 if self.base else 0
        experts = tuple(
            replace(
                found,
                settings=self._settings(model, names[n_bases + i], position),
                imatrix=model.imatrix,
            )
            for i, (model, found) in enumerate(zip(self.experts, inputs[n_bases:], strict=True))
        )
        return Draft(
            name,
            inputs[0] if self.base else None,
            experts,
            self._settings(None, name, position),
            rows=rows,
        )

    def _map_rows(self, name: str, inputs: Sequence[InputTensor]) -> RowMap | None:
        """Map the rows of a tensor of tokens; None for any other, and where all inputs are alike."""
        if not has_rows_of_tokens(name) and name not in PER_TOKEN:
            return None
        sources = [self.sources[model.path] for model in self.models]
        specs = [tensor.spec for tensor in inputs]
        if name in PER_TOKEN:
            specs = [find_tensor(source, EMBEDDING) for source in sources]
        for source, spec in zip(sources, specs, strict=True):
            same_width(specs[0], spec, self.reference, source)
        rows = self.maps.find(name, sources, specs, self.recipe.base_of(self.slice))
        if rows is not None and name in PER_TOKEN:
            raise MismatchError(
                f"tensor {name!r} of {self.reference.path} has an entry for each token, and is not "
                "brought to another vocabulary; give base as tokenizer_source, and models of one "
                "vocabulary",
                tensor=name,
            )
        return rows

    def _source_name(self, i: int, name: str, tensor: str, offset: int) -> str:
        if layer_index(name) is None or layer_index(tensor) is not None:
            return tensor
        return f"blk.{self.starts[i] + offset}.{tensor}"

    def _input(self, i: int, name: str) -> InputTensor:
        path = self.models[i].path
        return InputTensor(self.indices[path], find_head(self.sources[path], name))

    def _settings(
        self, model: ModelInput | None, tensor: str, position: float
    ) -> dict[str, Setting]:
        """Resolve the parameters of one model, or with None those of the merge."""
        levels: list[Parameters] = [model.parameters] if model else []
        levels += [self.slice.parameters, self.recipe.parameters, self.recipe.defaults]
        fits = partial(self._fits, tensor)
        settings = {}
        for key, parameter in self.method.parameters_of(model=model is not None).items():
            found = look_up(key, levels, fits, position)
            value = parameter.default if found is None else found
            if value is None:
                sentence = _missing(self.method, key, model, tensor, levels)
                meant = f"did you mean {key!r}?"  # what was ignored may be what is missing
                hints = [note for note in self.recipe.notes if note.endswith(meant)]
                raise RecipeError("; ".join([sentence, *hints[:1]]), field=key)
            owner = model.path if model is not None and key in model.parameters else None
            settings[key] = parameter.check(value, "" if owner is None else folder_name(owner))
        # A thousand models have the same for each of hundreds of tensors.
        return self._known_settings.setdefault(repr(settings), settings)

    def _fits(self, tensor: str, text: str) -> bool:
        """Tell whether a filter stands for a tensor: by its Hugging Face name, as mergekit looks.

        The GGUF name counts where no Hugging Face name is known, and for a text that none of the models' has.
        """
        known = self._is_hugging_face.get(text)
        if known is None:
            known = self._is_hugging_face[text] = any(text in name for name in self._hf_names)
        name = hf_name(self.reference.architecture, tensor) if known else None
        return text in (name or tensor)

    @cached_property
    def _hf_names(self) -> set[str]:
        """Of all models' tensors; made where a recipe has a filter."""
        return hugging_face_names(self.sources[model.path] for model in self.models)


def hugging_face_names(sources: Iterable[Source]) -> set[str]:
    """Return the Hugging Face names of all tensors of some models, as far as they are known."""
    tensors = {(source.architecture, name) for source in sources for name in source.specs()}
    return {known for tensor in tensors if (known := hf_name(*tensor)) is not None}


def _missing(
    method: Method, key: str, model: ModelInput | None, tensor: str, levels: Sequence[Parameters]
) -> str:
    whose = f" for {folder_name(model.path)}" if model else ""
    sentence = f"{method.name} needs the parameter {key}{whose}"
    if any(key in level for level in levels):  # rules, none of which fits
        sentence += f", and no rule gives one to {tensor}; add an entry with value alone"
    return sentence


def may_copy(draft: Draft, method: Method) -> bool:
    """Whether the result is the tensor of one model as it is, so that its stored bytes can be copied."""
    return draft.is_constant or method.copies(draft)
