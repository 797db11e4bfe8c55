"""What a merged file says of the merge that made it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from edgemerge.finding.cache import hub_origin
from edgemerge.formats.adapters.reference import model_name
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.output.checksums import TensorResult
from edgemerge.types import Plan

__all__ = ["provenance"]

TOKEN_KEYS = ("tokenizer_source", "tokens", "pad_to_multiple_of")


def provenance(the_plan: Plan, results: Sequence[TensorResult]) -> Mapping[str, bytes]:
    """Say in the file itself what it was made of; no path and no date, so that equal merges are equal.

    The checksum of an input is the CRC-32 of the CRC-32s (little-endian u32) of its tensors, in the
    order of the output's tensors; `edgemerge.tensor_crc32` holds those of the output's own tensors.
    `edgemerge.input_hub` has `org/name@commit` for each input of the hub's cache, an empty text for others.
    """
    models = the_plan.models
    mixture = the_plan.recipe.mixture
    inputs = [0] * len(models)
    tensors = [0] * len(the_plan.jobs)
    for i, (job, result) in enumerate(zip(the_plan.jobs, results, strict=False)):
        tensors[i] = result.output
        for tensor, checksum in zip(job.inputs, result.inputs, strict=True):
            inputs[tensor.model] = zlib.crc32(checksum.to_bytes(4, "little"), inputs[tensor.model])
    hub = [str(hub_origin(path) or "") for path in models]
    if mixture is not None:
        hub = [", ".join(str(found) for path in mixture.models() if (found := hub_origin(path)))]
    return {
        "edgemerge.version": encode_value(version("edgemerge"), "str"),
        "edgemerge.method": encode_value(the_plan.recipe.title, "str"),
        "edgemerge.recipe": encode_value(_recipe_json(the_plan), "str"),
        "edgemerge.seed": encode_value(the_plan.recipe.seed, "u64"),
        "edgemerge.inputs": encode_value([model_name(path) for path in models], "[str]"),
        "edgemerge.input_crc32": encode_value(inputs, "[u32]"),
        **({"edgemerge.input_hub": encode_value(hub, "[str]")} if any(hub) else {}),
        "edgemerge.tensor_crc32": encode_value(tensors, "[u32]"),
    }


def _recipe_json(the_plan: Plan) -> str:
    """Return the recipe as canonical JSON, models by file name."""
    recipe = asdict(the_plan.recipe)
    for dropped in ("notes", "memory", "chat_template", "name", "stages", "out_format"):
        del recipe[dropped]
    if recipe["mixture"] is None:  # as in files from before there were mixtures
        del recipe["mixture"]
    for part in recipe["slices"]:
        if part["base"] is None:  # as in files from before slices had bases
            del part["base"]
        for model in part["inputs"]:
            if model["imatrix"] is None:  # as in files from before models had importances
                del model["imatrix"]
    source, tokens, multiple = (recipe.pop(key) for key in TOKEN_KEYS)
    if any(job.rows is not None for job in the_plan.jobs):
        if source is not None:
            is_word = source in ("base", "union")
            recipe["tokenizer_source"] = source if is_word else model_name(Path(source))
        recipe |= {"tokens": tokens} if tokens else {}
        recipe |= {"pad_to_multiple_of": multiple} if multiple else {}
    recipe["out_type"] = the_plan.file_type
    return json.dumps(recipe, default=model_name, sort_keys=True)
