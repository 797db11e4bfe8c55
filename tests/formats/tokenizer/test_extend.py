"""Vocabularies with tokens added: the order of new tokens, and what GGUF says of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from edgemerge.formats.gguf.metadata import encode_value, get_value
from edgemerge.formats.tokenizer.extend import Extension, NewToken, added_token
from edgemerge.formats.tokenizer.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
)
from edgemerge.formats.tokenizer.table import TokenTable, TokenTables

Token = tuple[str, int] | tuple[str, int, float]


def vocabulary(
    *tokens: Token, merges: Sequence[str] | None = None, has_scores: bool = True
) -> dict[str, bytes]:
    keys: dict[str, tuple[Any, str]] = {
        "tokens": ([token[0] for token in tokens], "[str]"),
        "token_type": ([token[1] for token in tokens], "[i32]"),
        "bos_token_id": (0, "u32"),
    }
    if has_scores:
        scores = [token[2] if len(token) > 2 else -float(i) for i, token in enumerate(tokens)]
        keys["scores"] = scores, "[f32]"
    if merges is not None:
        keys["merges"] = list(merges), "[str]"
    found = {f"tokenizer.ggml.{k}": encode_value(v, kind) for k, (v, kind) in keys.items()}
    return found | {"general.architecture": encode_value("llama", "str")}


def extend(metadata: Mapping[str, bytes]) -> Extension:
    return Extension(metadata, TokenTables())


def facts(metadata: Mapping[str, bytes]) -> list[tuple[str, int, float]]:
    columns: list[Any] = [
        get_value(metadata, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "scores")
    ]
    return list(zip(*columns, strict=True))


BASE = vocabulary(("<s>", CONTROL), ("a", NORMAL), ("b", NORMAL), ("[PAD3]", UNUSED))


def test_normal_tokens_come_before_added_ones_in_the_order_of_models_and_ids() -> None:
    first = vocabulary(("<s>", CONTROL), ("<x>", CONTROL, -7.0), ("a", NORMAL), ("d", NORMAL, -9.0))
    second = vocabulary(
        ("c", NORMAL, -5.0), ("d", NORMAL, -6.0), ("<y>", USER_DEFINED), ("<x>", USER_DEFINED)
    )
    extension = extend(BASE)
    assert extension.join([first, second]) == [2, 2]
    assert facts(extension.metadata())[3:] == [
        ("d", NORMAL, -9.0),
        ("c", NORMAL, -5.0),
        ("<x>", CONTROL, -7.0),
        ("<y>", USER_DEFINED, -2.0),
    ]
    assert len(extension) == 7
    assert [extension.find(text) for text in (b"b", b"d", b"<x>", b"[PAD3]")] == [2, 3, 5, None]


def test_a_token_that_one_vocabulary_was_given_is_an_added_one() -> None:
    """mergekit's `out_added_tokens`."""
    first = vocabulary(("x", NORMAL), ("a", CONTROL))
    second = vocabulary(("x", USER_DEFINED, -1000.0), ("b", NORMAL), ("a", USER_DEFINED))
    extension = extend(BASE)
    assert extension.join([first, second]) == [0, 1]
    found = facts(extension.metadata())
    assert found[3:] == [("x", USER_DEFINED, -1000.0)]
    assert found[1][1] == CONTROL  # the first to say so
    assert found[2][1] == NORMAL


def test_padding_is_left_out_of_every_vocabulary_and_may_come_back() -> None:
    extension = extend(BASE)
    assert extension.join([vocabulary(("a", NORMAL), ("[PAD1]", UNUSED))]) == [0]
    assert [text for text, _, _ in facts(extension.metadata())] == ["<s>", "a", "b"]
    assert extension.pad(4) == 1
    assert facts(extension.metadata())[3] == ("[PAD3]", UNUSED, -10000.0)
    assert extension.pad(4) == 0


def test_only_merges_that_make_new_tokens_of_known_ones_are_carried() -> None:
    base = vocabulary(
        *[(t, NORMAL) for t in ("a", "b", "c", "ab")], merges=["a b"], has_scores=False
    )
    other = vocabulary(
        *[(t, NORMAL) for t in ("a", "b", "c", "bc", "ab", "abc", "Ġz")],
        ("<x>", CONTROL),
        merges=["b c", "a b", "a bc", "ab c", "Ġ z", "a b"],
        has_scores=False,
    )
    extension = extend(base)
    assert extension.join([other]) == [4]
    found = extension.metadata()
    assert get_value(found, "tokenizer.ggml.tokens") == [
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "abc",
        "Ġz",
        "<x>",
    ]
    assert get_value(found, "tokenizer.ggml.merges") == ["a b", "b c", "a bc", "ab c"]
    assert "tokenizer.ggml.scores" not in found


def test_spaces_of_added_tokens_are_those_of_other_tokens() -> None:
    """GGUF spells the same token with a space where it was added, else with U+2581."""
    extension = extend(vocabulary(("▁▁", NORMAL), ("<0x0A>", BYTE)))
    assert extension.join([vocabulary(("  ", USER_DEFINED), ("<0x0A>", BYTE))]) == [0]
    assert len(extension) == 2
    assert extension.find("▁▁".encode()) == extension.find(b"  ") == 0


def test_nothing_new_changes_no_byte() -> None:
    base = vocabulary(("a", NORMAL), ("b", NORMAL), merges=[])
    extension = extend(base)
    assert extension.join([base]) == [0]
    kept = {key: value for key, value in base.items() if key.startswith("tokenizer.")}
    assert extension.metadata() == kept


def test_a_vocabulary_without_types_gets_them() -> None:
    base = {k: v for k, v in BASE.items() if not k.endswith("token_type")}
    extension = extend(base)
    extension.add(added_token("<|x|>"))
    extension.add(added_token("a▁b"))
    assert [(text, kind) for text, kind, _ in facts(extension.metadata())][3:] == [
        ("[PAD3]", NORMAL),  # by no type is it padding
        ("<|x|>", CONTROL),
        ("a b", USER_DEFINED),
    ]


@pytest.mark.parametrize(("text", "wanted"), [("a", 1), ("[PAD3]", 3), ("z", None)])
def test_looking_a_text_up(text: str, wanted: int | None) -> None:
    table = TokenTable(BASE)
    assert table.find_text(text.encode()) == wanted
    assert (len(table), table.n_named) == (4, 3)


def test_a_repeated_text_is_found_under_its_own_number() -> None:
    twice = TokenTable(vocabulary(("x", NORMAL), ("y", NORMAL), ("x", NORMAL)))
    assert twice.find(twice.keys).tolist() == [0, 1, 2]
    assert twice.find(twice.keys[[2, 2]]).tolist() == [0, 0]
    assert NewToken(twice.text(2), NORMAL, 0.0).text == b"x"
