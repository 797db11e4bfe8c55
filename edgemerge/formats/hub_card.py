"""`general.*` keys of a Hugging Face directory: name, size and what its model card says.

gguf's own `Metadata` finds them, the code that llama.cpp's converter runs; its writer records them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from edgemerge.formats.metadata import encode_value

__all__ = ["general_metadata"]

_logger = logging.getLogger(__name__)


def general_metadata(path: Path, architecture: str, n_params: int) -> dict[str, bytes]:
    """Return the encoded `general.*` keys.

    Parameters
    ----------
    path : Path
        The directory.
    architecture : str
        GGUF's name of it.
    n_params : int
        Number of weights; gives the size label (`7.2B`).
    """
    import gguf  # imported late: it is slow, and planning from GGUF files alone does not need it

    path = Path(os.path.abspath(path))  # "." has no name to go by
    try:
        card = gguf.Metadata.load(None, path, None, n_params)
        return _record(gguf, card, path, architecture, n_params)
    except (
        Exception
    ) as e:  # whatever YAML a stranger's model card holds, the weights are none the worse
        _logger.warning("%s: the model card is left out, it cannot be read (%s)", path, e)
        return _record(gguf, gguf.Metadata(), path, architecture, n_params)


def _record(gguf: Any, card: Any, path: Path, architecture: str, n_params: int) -> dict[str, bytes]:
    card.name = card.name or path.name
    card.size_label = card.size_label or gguf.size_label(n_params, n_params, 0, 0)
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
