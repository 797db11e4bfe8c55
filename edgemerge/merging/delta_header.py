"""What a delta's file says of itself: which base it is for, and what it was made of."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from edgemerge.finding.cache import hub_origin
from edgemerge.formats.adapters.adapted import AdaptedSource
from edgemerge.formats.adapters.base_sample import sample_checksum
from edgemerge.formats.adapters.delta import DELTA, EXPONENTS, KEPT, SAMPLE, VERSION, VERSION_KEY
from edgemerge.formats.adapters.gguf import ALPHA
from edgemerge.formats.adapters.reference import model_name
from edgemerge.formats.gguf.metadata import Array, encode_value, get_value
from edgemerge.merging.delta_forms import Form, LowRankForm
from edgemerge.merging.delta_pieces import Measured
from edgemerge.merging.stages import stage_record
from edgemerge.types import Source

__all__ = ["Making", "delta_metadata"]

# Of the expert's own card; the other keys of `general.` say what is in that file.
CARD = {"name", "author", "organization", "license", "license.name", "license.link", "version"}
CARD |= {"description", "languages", "tags", "url", "repo_url"}


@dataclass(frozen=True, slots=True)
class Making:
    """What a delta is made of."""

    base: Source
    expert: Source
    setting: tuple[str, float]
    measured: Sequence[Measured]


def delta_metadata(
    making: Making, forms: Sequence[Form], checksums: Sequence[int], kept: float
) -> dict[str, bytes]:
    """Write the keys of a delta; their bytes are as many whatever the checksums and what is kept.

    Parameters
    ----------
    making : Making
        What it was made of.
    forms : sequence of Form
        Of the changes that are stored, in the order of the file.
    checksums : sequence of int
        CRC-32 of the stored tensors, in the order of the file.
    kept : float
        Part of the energy that is stored.
    """
    base, expert = making.base, making.expert
    names = [model_name(base.path), model_name(expert.path)]
    alphas = [form.alpha for form in forms if isinstance(form, LowRankForm)]
    hub = [str(hub_origin(source.path) or "") for source in (base, expert)]
    return {
        "general.type": encode_value(DELTA, "str"),
        "general.architecture": encode_value(base.architecture, "str"),
        **_card(expert),
        "general.base_model.count": encode_value(1, "u32"),
        "general.base_model.0.name": encode_value(names[0], "str"),
        VERSION_KEY: encode_value(VERSION, "u32"),
        SAMPLE: encode_value(sample_checksum(base), "u32"),
        EXPONENTS: encode_value([form.exponent for form in forms], "[i32]"),
        KEPT: encode_value(kept, "f32"),
        **({ALPHA: encode_value(alphas[0], "f32")} if alphas else {}),
        "edgemerge.version": encode_value(version("edgemerge"), "str"),
        "edgemerge.method": encode_value(DELTA, "str"),
        "edgemerge.recipe": encode_value(_recipe_json(names, making.setting), "str"),
        "edgemerge.seed": encode_value(0, "u64"),
        "edgemerge.inputs": encode_value(names, "[str]"),
        "edgemerge.input_crc32": encode_value(_input_checksums(making.measured), "[u32]"),
        **({"edgemerge.input_hub": encode_value(hub, "[str]")} if any(hub) else {}),
        **_earlier(expert),
        "edgemerge.tensor_crc32": encode_value(list(checksums), "[u32]"),
    }


def _card(expert: Source) -> Mapping[str, bytes]:
    if isinstance(expert, AdaptedSource):  # whose metadata are the base's
        return {}
    stated = {f"general.{key}" for key in CARD}
    return {key: raw for key, raw in expert.metadata().items() if key in stated}


def _recipe_json(names: Sequence[str], setting: tuple[str, float]) -> str:
    """Return what was done, in the form of a recipe."""
    name, value = setting
    recipe = {
        "method": DELTA,
        "base": names[0],
        "parameters": {name: [{"value": value, "filter": None}]},
        "slices": [{"inputs": [{"path": names[1], "layer_range": None, "parameters": {}}]}],
    }
    return json.dumps(recipe, sort_keys=True)


def _input_checksums(measured: Sequence[Measured]) -> list[int]:
    """Return the CRC-32 of the CRC-32s of all compared tensors, of base and expert, as of a merge."""
    found = [0, 0]
    for one in measured:
        for i, checksum in enumerate(one.checksums):
            found[i] = zlib.crc32(checksum.to_bytes(4, "little"), found[i])
    return found


def _earlier(expert: Source) -> Mapping[str, bytes]:
    """Say how the expert was made, where edgemerge merged it."""
    metadata = expert.metadata()
    if isinstance(expert, AdaptedSource) or not isinstance(
        get_value(metadata, "edgemerge.inputs"), Array
    ):
        return {}
    try:
        earlier = json.loads(str(get_value(metadata, "edgemerge.stages", "[]")))
    except (ValueError, RecursionError):  # another program changed it
        earlier = []
    record = stage_record(model_name(expert.path), metadata)
    stages = [*(earlier if isinstance(earlier, list) else []), record]
    return {"edgemerge.stages": encode_value(json.dumps(stages, sort_keys=True), "str")}
