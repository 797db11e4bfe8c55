"""From a recipe and open models to a `Plan`: every decision of a merge, before any tensor data is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgemerge.architectures import hf_name, layer_index
from edgemerge.budget import ArenaNeed, aligned, divide_budget, rows_in_arena
from edgemerge.compatibility import check_models, find_tensor, is_constant, same_shape
from edgemerge.errors import FormatError, MismatchError, RecipeError
from edgemerge.formats.codec import CODECS, row_bytes
from edgemerge.formats.filetypes import FILE_TYPES, dominant_file_type, keep_types, tensor_types
from edgemerge.formats.metadata import encode_value, get_value
from edgemerge.methods import Method, count_passes, find_method, is_pruned
from edgemerge.parameters import look_up
from edgemerge.types import (
    InputTensor,
    ModelInput,
    Parameters,
    Plan,
    Recipe,
    Setting,
    Slice,
    Source,
    TensorJob,
    TensorSpec,
)

__all__ = ["DEFAULT_MEMORY", "make_plan"]

DEFAULT_MEMORY = 512 << 20
KEEP = "keep"
UNQUANTISED = ("F32", "F16", "BF16")
DROPPED_KEYS = re.compile(r"general\.(file_type|quantization_version|name)|(split|edgemerge)\..*")
COUNTER_BYTES = 4 * ((1 << 15) + 2 * (1 << 16))  # of the radix select, per expert
ELECTION_BYTES = 3 * 2048 * 4
ARRAYS = 8  # what alignment may add to one arena, in arrays


def make_plan(
    recipe: Recipe,
    open_model: Callable[[Path], Source],
    *,
    memory: int | None = None,
    threads: int = 1,
) -> Plan:
    """Decide a merge.

    Parameters
    ----------
    recipe : Recipe
        What is wanted.
    open_model : callable
        Path -> open `Source`; called once per model.
    memory : int, optional
        Budget in bytes for the whole process; else the recipe's, else 512 MiB.
    threads : int
        Workers at most.

    Raises
    ------
    RecipeError, FormatError, MismatchError, BudgetError
        See `edgemerge.errors`; nothing has been written.
    """
    method = find_method(recipe.method)
    _check_counts(recipe, method)
    models = recipe.models()
    sources = {path: open_model(path) for path in models}
    notes = [*recipe.notes, *check_models(list(sources.values()))]
    drafts = list(_draft_jobs(recipe, method, models, sources))
    file_type, types = _choose_types(recipe, method, drafts, sources, notes)
    metadata = _output_metadata(recipe, method, sources, drafts, file_type, types)
    jobs = [_finish(draft, method, types[draft.name]) for draft in drafts]
    needs = [_arena_need(job) for job in jobs]
    budget = memory or recipe.memory or DEFAULT_MEMORY
    header_bytes = sum(len(v) for source in sources.values() for v in source.metadata().values())
    workers, arena_bytes = divide_budget(needs, budget, threads, 2 * header_bytes)
    return Plan(
        recipe=recipe,
        models=models,
        jobs=tuple(
            _with_rows(job, need, arena_bytes) for job, need in zip(jobs, needs, strict=True)
        ),
        metadata=metadata,
        file_type=file_type,
        budget=budget,
        workers=workers,
        arena_bytes=arena_bytes,
        notes=tuple(dict.fromkeys(notes)),
    )


def _check_counts(recipe: Recipe, method: Method) -> None:
    if method.needs_base and recipe.base is None:
        raise RecipeError(
            f"{method.name} needs the base that the models were tuned from; give it with --base "
            "or base_model",
            field="base_model",
        )
    least, most = method.n_models
    for part in recipe.slices:
        count = len(_experts(part, recipe.base, method))
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if most == least else f"at least {least}"
            beside = " besides the base" if method.needs_base else ""
            raise RecipeError(
                f"{method.name} takes {wanted} model{'s' * (least != 1)}{beside}, not {count}",
                field="models",
            )


def _experts(part: Slice, base: Path | None, method: Method) -> list[ModelInput]:
    """Models of a slice without the base's own entry, which no method on task vectors counts."""
    if not method.needs_base:
        return list(part.inputs)
    return [model for model in part.inputs if model.path != base]


# -- which tensors, from which models ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Draft:
    """A job before types and block heights are known."""

    name: str  # in the output
    base: InputTensor | None
    experts: tuple[InputTensor, ...]
    settings: Mapping[str, Setting]
    is_copy: bool = False  # a constant: taken over as it is

    @property
    def reference(self) -> TensorSpec:
        """The input whose shape and type the output follows."""
        return (self.base or self.experts[0]).spec


def _draft_jobs(
    recipe: Recipe, method: Method, models: tuple[Path, ...], sources: Mapping[Path, Source]
) -> Iterator[_Draft]:
    """Yield the output's tensors in its order: what precedes the layers, the layers, the rest."""
    parts = [_Part(recipe, method, part, models, sources) for part in recipe.slices]
    reference = parts[0].reference
    names = list(reference.specs())
    layers = [layer for name in names if (layer := layer_index(name)) is not None]
    first = next((i for i, name in enumerate(names) if layer_index(name) is not None), len(names))
    for i, name in enumerate(names):
        if layer_index(name) is None and i < first:
            yield parts[0].draft(name, name, 0)
    if len(parts) == 1 and parts[0].is_whole(max(layers, default=-1) + 1):
        # The usual merge: the base's own order, which for GGUF inputs need not go layer by layer.
        for name in names[first:]:
            yield parts[0].draft(name, name, layer_index(name) or 0)
        _check_extra(parts[0], set(names))
        return
    n_done = 0
    for part in parts:
        for offset in range(part.n_layers):
            for stem in part.stems(offset):
                yield part.draft(f"blk.{n_done}.{stem}", stem, offset)
            n_done += 1
    for name in names[first:]:
        if layer_index(name) is None:
            yield parts[-1].draft(name, name, 0)


def _check_extra(part: _Part, known: set[str]) -> None:
    """A tensor that only an expert has would be lost without a word."""
    for model in part.models:
        for name in part.sources[model.path].specs():
            if name not in known and not is_constant(name):
                raise MismatchError(
                    f"tensor {name!r} of {model.path} is missing in {part.reference.path}; "
                    "only fine-tunes of one base can be merged",
                    tensor=name,
                )


class _Part:
    """One slice, with its models open and its layers counted."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        part: Slice,
        models: tuple[Path, ...],
        sources: Mapping[Path, Source],
    ) -> None:
        self.recipe, self.method, self.slice = recipe, method, part
        self.sources = sources
        self.indices = {path: i for i, path in enumerate(models)}
        self.experts = _experts(part, recipe.base, method)
        self.base = self._base() if method.needs_base else None
        self.models = ([self.base] if self.base else []) + self.experts
        self.reference = sources[self.models[0].path]
        ranges = [self._range(model) for model in self.models]
        self.starts = [start for start, _ in ranges]
        self.n_layers = ranges[0][1] - ranges[0][0]
        self.positions = [
            offset / (self.n_layers - 1) if self.n_layers > 1 else 1.0
            for offset in range(self.n_layers)
        ]

    def _base(self) -> ModelInput:
        """The base's own entry in the slice, else the base with the layers of the first expert."""
        assert self.recipe.base is not None
        for model in self.slice.inputs:
            if model.path == self.recipe.base:
                return model
        return ModelInput(self.recipe.base, self.experts[0].layer_range)

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
                f"layer_range [{start}, {stop}] goes beyond the {count} layers of {model.path}",
                field="layer_range",
            )
        return start, stop

    def is_whole(self, n_layers: int) -> bool:
        """Tell whether every model gives all of its layers, in place."""
        return set(self.starts) == {0} and self.n_layers >= n_layers

    def stems(self, offset: int) -> list[str]:
        """What the reference has in one layer, without its `blk.N.`."""
        prefix = f"blk.{self.starts[0] + offset}."
        return [n.removeprefix(prefix) for n in self.reference.specs() if n.startswith(prefix)]

    def draft(self, name: str, tensor: str, offset: int) -> _Draft:
        """Collect one output tensor; `tensor` is a stem inside a layer or a whole name."""
        if is_constant(name):
            found = self._input(0, self._source_name(0, name, tensor, offset))
            return _Draft(name, None, (found,), {"scale": 1.0}, is_copy=True)
        names = [self._source_name(i, name, tensor, offset) for i in range(len(self.models))]
        inputs = [self._input(i, source_name) for i, source_name in enumerate(names)]
        for i, other in enumerate(inputs[1:], start=1):
            same_shape(
                inputs[0].spec, other.spec, self.reference, self.sources[self.models[i].path]
            )
        position = self.positions[offset] if layer_index(name) is not None else 0.0
        n_bases = 1 if self.base else 0
        experts = tuple(
            replace(found, settings=self._settings(model, names[n_bases + i], position))
            for i, (model, found) in enumerate(zip(self.experts, inputs[n_bases:], strict=True))
        )
        return _Draft(
            name,
            inputs[0] if self.base else None,
            experts,
            self._settings(None, names[0], position),
        )

    def _source_name(self, i: int, name: str, tensor: str, offset: int) -> str:
        if layer_index(name) is None or layer_index(tensor) is not None:
            return tensor
        return f"blk.{self.starts[i] + offset}.{tensor}"

    def _input(self, i: int, name: str) -> InputTensor:
        path = self.models[i].path
        spec = find_tensor(self.sources[path], self.sources[path].specs(), name)
        return InputTensor(self.indices[path], spec)

    def _settings(
        self, model: ModelInput | None, tensor: str, position: float
    ) -> dict[str, Setting]:
        """Resolve the parameters of one model, or with None those of the merge."""
        levels: list[Parameters] = [model.parameters] if model else []
        levels += [self.slice.parameters, self.recipe.parameters, self.recipe.defaults]
        names = [n for n in (hf_name(self.reference.architecture, tensor), tensor) if n]
        table = self.method.model_parameters if model else self.method.global_parameters
        settings: dict[str, Setting] = {}
        for key, default in table.items():
            value = look_up(key, levels, names, position)
            if value is None and default is None:
                of = f" for {model.path.name}" if model else ""
                raise RecipeError(f"{self.method.name} needs the parameter {key}{of}", field=key)
            settings[key] = check_setting(key, default if value is None else value)
        if "epsilon" in settings and not _is_valid_della(settings):
            raise RecipeError(
                f"density {settings['density']} plus or minus epsilon {settings['epsilon']} "
                "must stay inside (0, 1)",
                field="epsilon",
            )
        return settings


def check_setting(key: str, value: Setting | None) -> Setting:
    """Refuse a value that a parameter cannot have."""
    if key in ("normalize", "int8_mask"):
        valid = isinstance(value, bool)
    elif key == "rescale":
        valid = isinstance(value, bool) or value in ("l1", "expectation")
    else:
        valid = isinstance(value, float | int) and not isinstance(value, bool)
    if key in ("density", "gamma", "epsilon") and valid:
        valid = 0.0 <= float(value or 0.0) <= 1.0
    if not valid or value is None:
        raise RecipeError(f"the parameter {key} cannot be {value!r}", field=key)
    return value


def _is_valid_della(settings: Mapping[str, Setting]) -> bool:
    density, epsilon = float(settings["density"]), float(settings["epsilon"])
    return not 0 < density < 1 or (density - epsilon > 0 and density + epsilon < 1)


# -- types and metadata ---------------------------------------------------------------------------------------


def _choose_types(
    recipe: Recipe,
    method: Method,
    drafts: Sequence[_Draft],
    sources: Mapping[Path, Source],
    notes: list[str],
) -> tuple[str, dict[str, str]]:
    """Choose the file type, and from it the type of every tensor."""
    reference = sources[recipe.models()[0]]
    specs = {draft.name: replace(draft.reference, name=draft.name) for draft in drafts}
    quantised = any(spec.dtype not in UNQUANTISED for spec in specs.values())
    default = KEEP if quantised else "F32" if recipe.dtype == "float32" else "F16"
    file_type = recipe.out_type or default
    if file_type.lower() == KEEP:
        copied = {d.name: d.reference.dtype for d in drafts if _may_copy(d, method)}
        kept, said = keep_types({n: s for n, s in specs.items() if n not in copied})
        notes += said
        return KEEP, {name: copied.get(name) or kept[name] for name in specs}
    if file_type.upper() not in FILE_TYPES:
        known = ", ".join([*FILE_TYPES, KEEP])
        raise RecipeError(f"unknown type {file_type!r}; choose one of {known}", field="type")
    metadata = _with_block_count(reference, drafts)
    types = tensor_types(file_type.upper(), specs, metadata, reference.architecture)
    return file_type.upper(), types


def _may_copy(draft: _Draft, method: Method) -> bool:
    scaled = draft.experts[0].settings.get("scale", 1.0) != 1.0
    return draft.is_copy or (method.name == "passthrough" and not scaled)


def _with_block_count(reference: Source, drafts: Sequence[_Draft]) -> dict[str, bytes]:
    layers = {layer for draft in drafts if (layer := layer_index(draft.name)) is not None}
    key = f"{reference.architecture}.block_count"
    metadata = dict(reference.metadata())
    old = get_value(metadata, key)
    if layers and len(layers) != old and not _fits_layers(metadata, old):
        raise RecipeError(
            f"{reference.path} has settings per layer, which slices cannot re-order yet; "
            "merge whole models",
            field="slices",
        )
    if layers and len(layers) != old:
        metadata[key] = encode_value(len(layers), "u32")
    return metadata


def _fits_layers(metadata: Mapping[str, bytes], n_layers: object) -> bool:
    """Tell whether no hyper-parameter is an array with an entry per layer."""
    own = (key for key in metadata if not key.startswith(("tokenizer.", "general.")))
    return not any(
        isinstance(value := get_value(metadata, key), list) and len(value) == n_layers
        for key in own
    )


def _output_metadata(
    recipe: Recipe,
    method: Method,
    sources: Mapping[Path, Source],
    drafts: Sequence[_Draft],
    file_type: str,
    types: Mapping[str, str],
) -> dict[str, bytes]:
    """Metadata of the output: the base's, the tokenizer source's tokenizer, and what it is now."""
    reference = sources[recipe.models()[0]]
    metadata = {
        k: v
        for k, v in _with_block_count(reference, drafts).items()
        if not DROPPED_KEYS.fullmatch(k)
    }
    if recipe.tokenizer_source != "base":
        path = Path(recipe.tokenizer_source)
        if path not in sources:
            raise RecipeError(
                f"tokenizer_source {path} is none of the models; give base or one of them",
                field="tokenizer_source",
            )
        theirs = sources[path].metadata()
        metadata = {k: v for k, v in metadata.items() if not k.startswith("tokenizer.")}
        metadata |= {k: v for k, v in theirs.items() if k.startswith("tokenizer.")}
    if recipe.chat_template is not None:
        metadata["tokenizer.chat_template"] = encode_value(recipe.chat_template, "str")
    names = [path.stem if path.is_file() else path.name for path in recipe.models()]
    title = names[0] if len(names) == 1 else f"{method.name} merge of {', '.join(names)}"
    metadata["general.name"] = encode_value(title, "str")
    metadata["general.file_type"] = _file_type_id(file_type, reference, drafts, types)
    if any(dtype not in UNQUANTISED for dtype in types.values()):
        metadata["general.quantization_version"] = encode_value(2, "u32")
    return metadata


def _file_type_id(
    file_type: str, reference: Source, drafts: Sequence[_Draft], types: Mapping[str, str]
) -> bytes:
    if file_type != KEEP:
        return encode_value(FILE_TYPES[file_type].id, "u32")
    stated = reference.metadata().get("general.file_type")
    if stated is not None and all(types[d.name] == d.reference.dtype for d in drafts):
        return stated
    return encode_value(
        dominant_file_type(types, {draft.name: draft.reference for draft in drafts}), "u32"
    )


# -- jobs and memory --------------------------------------------------------------------------------------------


def _finish(draft: _Draft, method: Method, dtype: str) -> TensorJob:
    shape = draft.reference.shape
    spec = TensorSpec(draft.name, shape, dtype, 0)
    spec = replace(spec, nbytes=spec.n_rows * row_bytes(dtype, spec.n_cols))
    copies = _may_copy(draft, method)
    passes = 1
    if not copies:
        passes = count_passes(method, [e.settings for e in draft.experts], draft.settings)
    job = TensorJob(
        out=spec,
        method="passthrough" if copies else method.name,
        base=draft.base,
        experts=draft.experts,
        settings=draft.settings,
        rows_per_block=0,
        passes=passes,
    )
    if not job.is_byte_copy:
        for tensor in job.inputs:
            if tensor.spec.dtype not in CODECS:
                raise MismatchError(
                    f"tensor {tensor.spec.name!r} is stored as {tensor.spec.dtype}, which edgemerge "
                    "cannot decode yet; requantise that model to Q8_0 or F16 with llama-quantize",
                    tensor=tensor.spec.name,
                )
    return job


def _arena_need(job: TensorJob) -> ArenaNeed:
    """What `merge.Worker` and `arithmetic` will take from the arena for one tensor."""
    n_cols = job.out.n_cols
    widest = max(tensor.spec.row_bytes for tensor in (*job.inputs,))
    if job.is_byte_copy:
        return ArenaNeed(job.out.n_rows, n_cols, aligned(1) * ARRAYS, widest, surveyed=False)
    method = find_method(job.method)
    pruned = any(is_pruned(method, expert.settings) for expert in job.experts)
    fixed = aligned(1) * ARRAYS * (1 + len(job.experts)) + 4 * CODECS[job.out.dtype].scratch_len
    if method.elect:
        fixed += ELECTION_BYTES
    if pruned and method.prune in ("magnitude", "band"):
        fixed += COUNTER_BYTES * len(job.experts)
    if pruned and method.prune == "rank":
        fixed += len(job.experts) * 4 * (2 * n_cols + 2048)
    per_row = 4 * n_cols * len(job.inputs) + max(widest, job.out.row_bytes)
    per_row += n_cols if pruned else 0
    return ArenaNeed(job.out.n_rows, n_cols, fixed, per_row, surveyed=job.passes > 1)


def _with_rows(job: TensorJob, need: ArenaNeed, arena_bytes: int) -> TensorJob:
    rows = rows_in_arena(need, arena_bytes)
    # A tensor that is held whole is read once, however often it is surveyed.
    passes = 1 if rows >= need.n_rows else job.passes
    return replace(job, rows_per_block=rows, passes=passes)
