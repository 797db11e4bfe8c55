"""Runs a plan: every tensor through a worker, into one GGUF, or into the files of a split one.

Read top-down: `merge` plans, writes the header, lets the workers loose (`edgemerge.crew`), seals the file.
The result is the same for every budget and thread count.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.errors import OutputError
from edgemerge.formats import open_model
from edgemerge.formats.gguf_split import MAX_PARTS, part_paths, whole_name
from edgemerge.formats.gguf_writer import GgufLayout, make_layouts
from edgemerge.formats.imatrix import ImportanceMatrix
from edgemerge.formats.metadata import encode_value
from edgemerge.output import check_output
from edgemerge.output_parts import OutputParts
from edgemerge.plan import make_plan
from edgemerge.report import MergeReport, peak_rss_bytes
from edgemerge.types import Plan, Progress, Recipe, Source
from edgemerge.warm import warm_up

if TYPE_CHECKING:  # Numba takes most of a second to import: only a merge that runs pays for it
    from edgemerge.crew import Crew
    from edgemerge.stream import TensorResult

__all__ = ["Progress", "default_threads", "merge", "plan"]


def default_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def plan(recipe: Recipe, *, memory: int | None = None, threads: int | None = None) -> Plan:
    """Decide a merge without doing it; reads headers, and of tensors only the factors of NVFP4 weights.

    Parameters
    ----------
    recipe : Recipe
        From `load_recipe` or `make_recipe`.
    memory : int, optional
        Budget in bytes for the whole process; else the recipe's, else 512 MiB.
    threads : int, optional
        Workers at most; else the processors that this process may use.

    Raises
    ------
    EdgemergeError
        The recipe, a file, the models together or the budget are wrong.
    """
    with ExitStack() as stack:
        return make_plan(
            recipe,
            lambda path: _open(path, stack),
            memory=memory,
            threads=threads or default_threads(),
        )


def merge(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    memory: int | None = None,
    threads: int | None = None,
    split_bytes: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge models into one GGUF file, or a split one.

    Parameters
    ----------
    recipe : Recipe
        From `load_recipe` or `make_recipe`.
    output : path
        The file to make; it gets its name only when it is whole.
    memory, threads : int, optional
        As for `plan`.
    split_bytes : int, optional
        Write OUT-00001-of-00003.gguf and so on instead of OUT.gguf, with at most so many bytes of
        tensors in each, as llama.cpp's gguf-split does.
    force : bool
        Replace an existing output.
    progress : callable, optional
        Called with bytes done and bytes in all, from this thread.

    Returns
    -------
    MergeReport
        What was done, and what it took.

    Raises
    ------
    EdgemergeError
        See `edgemerge.errors`; the output is as it was.
    """
    started = time.monotonic()
    output = Path(output)
    if split_bytes is None:
        check_output(output, recipe.models(), force=force)
    with ExitStack() as stack:
        opened: dict[Path, Source] = {}

        def open_once(path: Path) -> Source:
            opened[path] = _open(path, stack)
            return opened[path]

        the_plan = make_plan(recipe, open_once, memory=memory, threads=threads or default_threads())
        layouts = _layouts(the_plan, [], split_bytes)
        paths = _name_files(output, layouts, split_bytes)
        _check_outputs(paths, recipe, force=force)
        warm_up(the_plan)
        sizes = [(path, layout.n_bytes) for path, layout in zip(paths, layouts, strict=True)]
        parts = stack.enter_context(OutputParts(sizes))
        _check_outputs(paths, recipe, force=force)  # again, now that nobody else can make them
        importance = None
        if recipe.imatrix is not None:
            importance = stack.enter_context(closing(ImportanceMatrix(recipe.imatrix)))
        crew = _new_crew(the_plan, list(opened.values()), progress, importance)
        notes = crew.prepare()
        results = crew.run(
            {
                name: (file, offset)
                for file, layout in zip(parts.files, layouts, strict=True)
                for name, offset in layout.offsets.items()
            }
        )
        layouts = _layouts(the_plan, results, split_bytes)
        for file, layout in zip(parts.files, layouts, strict=True):
            file.write(layout.header, 0)
        digest, files = parts.hash()
        parts.publish()
    return MergeReport(
        output=paths[0],
        out_bytes=sum(layout.n_bytes for layout in layouts),
        method=recipe.method,
        models=tuple(whole_name(path) for path in the_plan.models),
        type_bytes=_type_bytes(the_plan),
        file_type=the_plan.file_type,
        tensors=len(the_plan.jobs),
        elements=the_plan.n_elements,
        seconds=time.monotonic() - started,
        budget_bytes=the_plan.budget,
        peak_rss_bytes=peak_rss_bytes(),
        read_bytes=crew.traffic.read,
        written_bytes=crew.traffic.written + sum(len(layout.header) for layout in layouts),
        passes=max((job.passes for job in the_plan.jobs), default=0),
        workers=the_plan.workers,
        resumed_tensors=0,
        sha256=digest,
        notes=the_plan.notes + notes,
        files=files if split_bytes is not None else (),
    )


def _type_bytes(the_plan: Plan) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for job in the_plan.jobs:
        sizes[job.out.dtype] += job.out.nbytes
    return dict(sizes.most_common())


def _open(path: Path, stack: ExitStack) -> Source:
    source = open_model(path)
    stack.callback(source.close)
    return source


def _new_crew(
    the_plan: Plan,
    sources: Sequence[Source],
    progress: Progress | None,
    importance: ImportanceMatrix | None,
) -> Crew:
    from edgemerge.crew import Crew

    return Crew(the_plan, sources, progress, importance)


# -- the header ------------------------------------------------------------------------------------------


def _layouts(
    the_plan: Plan, results: Sequence[TensorResult], split_bytes: int | None
) -> list[GgufLayout]:
    """Lay the output out; checksums are zero until there are results, which does not change its size."""
    metadata = {**the_plan.metadata, **_provenance(the_plan, results)}
    return make_layouts(metadata, [job.out for job in the_plan.jobs], split_bytes)


def _name_files(output: Path, layouts: Sequence[GgufLayout], split_bytes: int | None) -> list[Path]:
    """Name the files of the output, one for each layout."""
    if split_bytes is None:
        return [output]
    if len(layouts) > MAX_PARTS:
        raise OutputError(
            f"would be a split of {len(layouts)} files; allow larger ones with --split-max-size",
            path=output,
        )
    return part_paths(output, len(layouts))


def _check_outputs(paths: Sequence[Path], recipe: Recipe, *, force: bool) -> None:
    for path in paths:
        check_output(path, recipe.models(), force=force)


def _provenance(the_plan: Plan, results: Sequence[TensorResult]) -> Mapping[str, bytes]:
    """Say in the file itself what it was made of; no path and no date, so that equal merges are equal.

    The checksum of an input is the CRC-32 of the CRC-32s (little-endian u32) of its tensors, in the
    order of the output's tensors; `edgemerge.tensor_crc32` holds those of the output's own tensors.
    """
    models = the_plan.models
    inputs = [0] * len(models)
    tensors = [0] * len(the_plan.jobs)
    for i, (job, result) in enumerate(zip(the_plan.jobs, results, strict=False)):
        tensors[i] = result.output
        for tensor, checksum in zip(job.inputs, result.inputs, strict=True):
            inputs[tensor.model] = zlib.crc32(checksum.to_bytes(4, "little"), inputs[tensor.model])
    return {
        "edgemerge.version": encode_value(version("edgemerge"), "str"),
        "edgemerge.method": encode_value(the_plan.recipe.method, "str"),
        "edgemerge.recipe": encode_value(_recipe_json(the_plan), "str"),
        "edgemerge.seed": encode_value(the_plan.recipe.seed, "u64"),
        "edgemerge.inputs": encode_value([whole_name(path) for path in models], "[str]"),
        "edgemerge.input_crc32": encode_value(inputs, "[u32]"),
        "edgemerge.tensor_crc32": encode_value(tensors, "[u32]"),
    }


def _recipe_json(the_plan: Plan) -> str:
    """Return the recipe as canonical JSON, models by file name."""
    recipe = asdict(the_plan.recipe)
    for dropped in ("notes", "memory", "chat_template", "tokenizer_source"):
        del recipe[dropped]
    recipe["out_type"] = the_plan.file_type
    return json.dumps(recipe, default=whole_name, sort_keys=True)
