"""What a directory says of the merge that made it: GGUF's `edgemerge.*` keys as texts.

They stand in the header of the first file of weights. A number of 32 bits has eight digits, so that the size
of the header is known before the checksums are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from edgemerge.formats.gguf.metadata import Array, encode_value, get_value
from edgemerge.formats.hub.safetensors import MAX_HEADER_VALUES

__all__ = ["CHECKSUMS_KEY", "encode_claims", "read_claims"]

PREFIX = "edgemerge."
CHECKSUMS_KEY = f"{PREFIX}tensor_crc32"  # here an object: GGUF name -> eight digits
# Other keys than these are texts.
SEED, INPUTS, INPUT_CHECKSUMS = (f"{PREFIX}{key}" for key in ("seed", "inputs", "input_crc32"))
_HEX = re.compile(r"[0-9a-f]{8}")


def encode_claims(metadata: Mapping[str, bytes], names: Sequence[str]) -> dict[str, str]:
    """Return the texts for a header.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        From `edgemerge.merging.record.provenance`, and more of these keys.
    names : sequence of str
        The tensors whose checksums it has, in order.
    """
    texts = {}
    for key in metadata:
        value = get_value(metadata, key)
        if not key.startswith(PREFIX) or value is None:
            continue
        if key == CHECKSUMS_KEY:
            assert isinstance(value, Array)
            table = {name: _hex(crc) for name, crc in zip(names, value, strict=True)}
            texts[key] = json.dumps(table, separators=(",", ":"))
        elif isinstance(value, Array):
            numbers = key == INPUT_CHECKSUMS
            texts[key] = json.dumps([_hex(item) if numbers else item for item in value])
        else:
            texts[key] = str(value)
    return texts


def _hex(value: object) -> str:
    assert isinstance(value, int)
    return f"{value:08x}"


def read_claims(texts: Mapping[str, str], names: Iterable[str]) -> dict[str, bytes]:
    """Return GGUF's keys again; what is not as `encode_claims` wrote it is left out.

    Parameters
    ----------
    texts : mapping of str to str
        Of a header; a stranger may have written it.
    names : iterable of str
        The tensors, in the order in which their checksums are wanted; none where one has none.
    """
    claims = {}
    for key, text in texts.items():
        if not key.startswith(PREFIX):
            continue
        if key == SEED:
            if text.isdecimal() and len(text) <= 20 and int(text) < 1 << 64:
                claims[key] = encode_value(int(text), "u64")
        elif key in (INPUTS, INPUT_CHECKSUMS, CHECKSUMS_KEY):
            encoded = _read_list(key, _parse(text), names)
            if encoded is not None:
                claims[key] = encoded
        else:
            claims[key] = encode_value(_as_bytes(text), "str")
    return claims


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # JSON may name halves of characters


def _parse(text: str) -> object:
    if text.count("[") + text.count("{") + text.count(",") > MAX_HEADER_VALUES:
        return None
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found


def _read_list(key: str, found: object, names: Iterable[str]) -> bytes | None:
    if key == CHECKSUMS_KEY:
        table = found if isinstance(found, dict) else {}
        found = [table.get(name) for name in names]
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        return None
    if key == INPUTS:
        return encode_value(list(map(_as_bytes, found)), "[str]")
    if not all(_HEX.fullmatch(item) for item in found):
        return None
    return encode_value([int(item, 16) for item in found], "[u32]")
