"""What a merged file says of the merge that made it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.split import whole_name
from edgemerge.output.checksums import TensorResult
from edgemerge.types import Plan

__all__ = ["provenance"]


def provenance(the_plan: Plan, results: Sequence[TensorResult]) -> Mapping[str, bytes]:
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
    for dropped in ("notes", "memory", "chat_template", "name", "stages", "out_format"):
        del recipe[dropped]
    for part in recipe["slices"]:
        if part["base"] is None:  # as in files from before slices had bases
            del part["base"]
    source = recipe.pop("tokenizer_source")
    if source != "base" and any(job.is_fitted for job in the_plan.jobs):
        recipe["tokenizer_source"] = source if source == "union" else whole_name(Path(source))
    recipe["out_type"] = the_plan.file_type
    return json.dumps(recipe, default=whole_name, sort_keys=True)
