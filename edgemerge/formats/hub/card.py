"""`general.*` keys of a Hugging Face directory: name, size and what its model card says.

gguf's own `Metadata` finds them, the code that llama.cpp's converter runs; its writer records them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path, PosixPath
from typing import Any

import yaml

from edgemerge.finding.cache import folder_name
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.yaml_file import MAX_RECIPE_BYTES
from edgemerge.types import TensorSpec

__all__ = ["general_metadata"]

MAX_CARD_BYTES = 4 << 20
# As objects of Python, JSON takes some 25 times as much. Published ones have a few kilobytes.
MAX_GENERATION_BYTES = 256 << 10

_logger = logging.getLogger(__name__)


def general_metadata(
    path: Path, architecture: str, specs: Iterable[TensorSpec]
) -> dict[str, bytes]:
    """Return the encoded `general.*` keys.

    Parameters
    ----------
    path : Path
        The directory.
    architecture : str
        GGUF's name of it.
    specs : iterable of TensorSpec
        All tensors; their sizes give the size label (`7.2B`, `8x7B`).
    """
    import gguf  # imported late: it is slow, and planning from GGUF files alone does not need it

    path = _NamedPath(os.path.abspath(path))  # "." has no name to go by
    counts = _count_weights(specs)
    try:
        _refuse_bomb(path / "README.md")
        _refuse_large(path / "generation_config.json", MAX_GENERATION_BYTES)
        card = gguf.Metadata.load(None, path, None, counts[0])
        return _record(gguf, card, path, architecture, counts)
    except (
        Exception
    ) as e:  # whatever YAML a stranger's model card holds, the weights are none the worse
        _logger.warning("%s: the model card is left out, it cannot be read (%s)", path, e)
        return _record(gguf, gguf.Metadata(), path, architecture, counts)


class _NamedPath(PosixPath):
    """A path by whose name gguf can go, also where it is a commit's in the hub's cache."""

    @property
    def name(self) -> str:
        return folder_name(Path(self))


def _refuse_large(path: Path, most: int) -> None:
    """Refuse a file that gguf would read whole."""
    if path.is_file() and path.stat().st_size > most:
        raise ValueError(f"{path.name} is larger than {most >> 10} KiB")


def _refuse_bomb(path: Path) -> None:
    """Refuse a model card that grows when it is read: YAML's aliases repeat what they point to."""
    if not path.is_file():
        return
    _refuse_large(path, MAX_CARD_BYTES)
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines[:1] != ["---"]:
        return
    front = "\n".join(takewhile(lambda line: line != "---", lines[1:])).replace("\t", "  ")
    if len(front) > MAX_RECIPE_BYTES:
        raise ValueError(f"its front matter is larger than {MAX_RECIPE_BYTES >> 10} KiB")
    # Scanning takes as long as reading, so it is left out where no alias can be.
    if "*" in front and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(front)):
        raise ValueError("its front matter has YAML aliases")


def _count_weights(specs: Iterable[TensorSpec]) -> tuple[int, int, int, int]:
    """Count all weights, those outside experts, those of one expert in each layer, and experts.

    As `GGUFWriter.get_total_parameter_count`.
    """
    total = shared = per_expert = n_experts = 0
    for spec in specs:
        total += spec.n_elements
        if "_exps." in spec.name and len(spec.shape) > 2:  # not their biases
            n_experts = spec.shape[0]
            per_expert += spec.n_elements // n_experts
        else:
            shared += spec.n_elements
    return total, shared, per_expert, n_experts


def _record(
    gguf: Any, card: Any, path: Path, architecture: str, counts: tuple[int, int, int, int]
) -> dict[str, bytes]:
    card.name = card.name or path.name
    card.size_label = card.size_label or gguf.size_label(*counts)
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    writer.add_type("model")
    card.set_gguf_meta_model(writer)
    return {key: _encode(value) for key, value in writer.kv_data[0].items()}


def _encode(value: Any) -> bytes:
    """Encode one `gguf.GGUFValue`; YAML may have made a number of what must be a string."""
    match value.type.name:
        case "STRING":
            return encode_value(str(value.value), "str")
        case "ARRAY":
            return encode_value([str(item) for item in value.value], "[str]")
        case "FLOAT32":
            return encode_value(float(value.value), "f32")
        case kind:
            return encode_value(int(value.value), {"UINT32": "u32", "INT32": "i32"}[kind])
