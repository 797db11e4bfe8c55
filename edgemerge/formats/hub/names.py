"""Names of stored tensors: what other tools put around them, and what inference does not use."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgemerge.formats.architectures import GLOBAL, KINDS_OF_MODEL, gguf_name, is_ignored, text_name

__all__ = ["is_adapter", "is_packed", "is_unused", "name_some", "own_name"]

# Left by torch.compile, DistributedDataParallel, PEFT and TRL, which save the module around the model.
WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "pretrained_model.")
# Parts of packed weights: GPTQ and AWQ, bitsandbytes, compressed-tensors, FP8 and mlx.
_PACKED = re.compile(
    r".+\.(qweight|qzeros|g_idx|scales|biases|SCB|weight_(packed|scale|scale_inv|shape|zero_point)"
    r"|(weight\.)?(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))"
)
_ADAPTER = re.compile(r".+\.(lora_[AB]|lora_embedding_[AB]|base_layer)\..+")
OTHER_TYPES = ("BOOL", "I16", "U16", "I32", "U32", "I64", "U64")
SHOWN = 3  # names in one note


def own_name(model_type: str, stored: str) -> str | None:
    """Return the name that transformers gives a tensor in the text model alone.

    Parameters
    ----------
    model_type : str
        config.json's.
    stored : str
        The name in the file.

    Returns
    -------
    str or None
        None for a tensor of a tower that sees or hears.
    """
    if any(tower in stored for tower in KINDS_OF_MODEL[model_type].towers):
        return None
    bare = stored
    while prefix := next((w for w in WRAPPERS if bare.startswith(w)), None):
        bare = bare.removeprefix(prefix)
    name = text_name(bare)
    # The model without its head, saved by itself, has no `model.` in front.
    if name is not None and not name.startswith("model.") and name not in GLOBAL.values():
        longer = f"model.{name}"
        if name.startswith("layers.") or gguf_name(model_type, longer) is not None:
            return longer
    return name


def is_unused(name: str, dtype: str) -> bool:
    """Tell whether inference does without a tensor: a buffer, another task's head, an index."""
    return is_ignored(name) or (
        dtype in OTHER_TYPES and not name.endswith((".weight", ".bias")) and not is_packed(name)
    )


def is_packed(name: str) -> bool:
    """Tell whether a tensor is a part of a quantised weight."""
    return _PACKED.fullmatch(name) is not None


def is_adapter(name: str) -> bool:
    """Tell whether a tensor belongs to a LoRA that was not merged into its model."""
    return _ADAPTER.fullmatch(name) is not None


def name_some(names: Sequence[str]) -> str:
    """Return the first few names in one line."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
