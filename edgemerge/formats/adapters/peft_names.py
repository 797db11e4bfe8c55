"""Names of the tensors in a PEFT adapter's file: whose module they are, and which part of its change.

They are those of `get_peft_model_state_dict`, and of training tools that save the whole state: with the
adapter's name, or with what a distributed run puts around modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.hub.names import own_name

__all__ = [
    "bare_name",
    "check_is_one",
    "module_of_tokens",
    "second_adapter",
    "split_factor",
    "split_saved",
    "unwrap",
]

_AROUND = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_ADAPTER = r"(\.(?P<adapter>(?!(weight|bias)$)[^.]+))?"
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)"
    rf"{_ADAPTER}(\.(?P<end>weight|bias))?"
)
_SAVED = re.compile(rf"\.(modules_to_save{_ADAPTER}|base_layer)(?=\.)")
_TOKENS = re.compile(rf"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta{_ADAPTER}")


def unwrap(stored: str) -> str:
    """Return a stored name without what a distributed run or a compiler puts around modules."""
    return _AROUND.sub("", stored)


def split_factor(stored: str) -> tuple[str, str]:
    """Split a stored name into its module and its kind, as A, B or B_bias; other tensors have none."""
    match = _FACTOR.fullmatch(unwrap(stored))
    if match is None:
        return stored, ""
    return match["module"], match["kind"] + ("_bias" if match["end"] == "bias" else "")


def module_of_tokens(stored: str) -> str | None:
    """Return the module of peft's trainable tokens; None of other tensors."""
    match = _TOKENS.fullmatch(unwrap(stored))
    return match["module"] if match else None


def split_saved(stored: str) -> tuple[str, str]:
    """Return the model's name of a tensor that is saved whole, and the adapter's where it is part of it."""
    name = unwrap(stored)
    match = _SAVED.search(name)
    return _SAVED.sub("", name), (match["adapter"] or "") if match else ""


def bare_name(module: str) -> str:
    """Return a module's name without what PEFT puts around it."""
    name = own_name("llama", f"{module}.weight") or f"{module}.weight"
    return name.removesuffix(".weight").replace(".base_layer", "")


def check_is_one(names: Iterable[str], path: Path) -> None:
    """Refuse a file of several adapters, of whose factors one would stand for all.

    Raises
    ------
    FormatError
        Factors have the names of two adapters, or a module has one of its factors twice.
    """
    adapters, seen = set[str](), set[tuple[str, str]]()
    for stored in names:
        name = unwrap(stored)
        match = _FACTOR.fullmatch(name) or _TOKENS.fullmatch(name)
        if match is None:
            continue
        part = split_factor(stored) if _FACTOR.fullmatch(name) else (match["module"], "tokens")
        adapters |= {match["adapter"]} - {None}
        if part in seen or len(adapters) > 1:
            raise second_adapter(stored, path)
        seen.add(part)


def second_adapter(stored: str, path: Path) -> FormatError:
    """Make the error for a file that holds several adapters."""
    return FormatError(
        "is of a second adapter in the file; save each adapter in a folder of its own",
        path=path,
        tensor=stored,
    )
