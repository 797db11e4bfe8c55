"""What the header of a directory's weights says of a merge, written and read back."""

from __future__ import annotations

import json

import pytest

from edgemerge.formats.gguf.metadata import encode_value, get_value
from edgemerge.formats.hub.claims import CHECKSUMS_KEY, encode_claims, read_claims

NAMES = ["output.weight", "token_embd.weight"]
CLAIMS = {
    "edgemerge.version": encode_value("1.0", "str"),
    "edgemerge.recipe": encode_value('{"method": "ties"}', "str"),
    "edgemerge.seed": encode_value(1 << 63, "u64"),
    "edgemerge.inputs": encode_value(["base [1].gguf", "ä"], "[str]"),
    "edgemerge.input_crc32": encode_value([0, 0xFFFFFFFF], "[u32]"),
    CHECKSUMS_KEY: encode_value([7, 0x12345678], "[u32]"),
}


def test_claims_come_back() -> None:
    others = {"general.name": encode_value("x", "str")}
    texts = encode_claims({**others, **CLAIMS}, NAMES)
    assert all(isinstance(text, str) for text in texts.values())
    assert read_claims(texts, NAMES) == CLAIMS


def test_checksums_are_given_in_the_order_that_is_asked_for() -> None:
    texts = encode_claims(CLAIMS, NAMES)
    found = read_claims(texts, reversed(NAMES))
    assert found[CHECKSUMS_KEY] == encode_value([0x12345678, 7], "[u32]")
    assert CHECKSUMS_KEY not in read_claims(texts, [*NAMES, "another"])


def test_the_size_does_not_depend_on_the_checksums() -> None:
    zeros = {CHECKSUMS_KEY: encode_value([0, 0], "[u32]")}
    texts = [encode_claims(CLAIMS | change, NAMES) for change in ({}, zeros)]
    assert len({len(json.dumps(text)) for text in texts}) == 1


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("seed", "-1"),
        ("seed", "9" * 30),
        ("inputs", "[1]"),
        ("inputs", "[" * 100_000),
        ("input_crc32", '["xyz"]'),
        ("tensor_crc32", '{"output.weight": 7}'),
        ("tensor_crc32", "[]"),
    ],
)
def test_what_a_stranger_wrote_is_left_out(key: str, text: str) -> None:
    assert read_claims({f"edgemerge.{key}": text}, NAMES) == {}


def test_half_a_character_is_replaced() -> None:
    found = read_claims({"edgemerge.method": "\ud800"}, NAMES)
    assert get_value(found, "edgemerge.method") == "?"
