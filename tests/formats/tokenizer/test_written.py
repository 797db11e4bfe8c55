"""Tokenizer files from GGUF's keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.tokenizer import written_process
from edgemerge.formats.tokenizer.sentencepiece_file import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_sentencepiece,
    write_sentencepiece,
)
from edgemerge.formats.tokenizer.written import tokenizer_files
from edgemerge.formats.tokenizer.written_spm import list_merges

MODEL = Path("model.gguf")


def make_spm(**changes: bytes) -> dict[str, bytes]:
    texts = ["<unk>", "<s>", "</s>", "a", "b", "ab", "aba", "  ", "[PAD8]"]
    types = [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL, NORMAL, USER_DEFINED, UNUSED]
    keys = {
        "model": encode_value("llama", "str"),
        "tokens": encode_value(texts, "[str]"),
        "token_type": encode_value(types, "[i32]"),
        "scores": encode_value([0.0, 0.0, 0.0, -3.0, -4.0, -1.0, -2.0, -1000.0, 0.0], "[f32]"),
        "bos_token_id": encode_value(1, "u32"),
        "eos_token_id": encode_value(2, "u32"),
        "add_eos_token": encode_value(True, "bool"),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items()}


def test_the_best_score_is_merged_first() -> None:
    texts = ["a", "b", "ab", "ba", "aba"]
    merges = list(list_merges(texts, [-9.0, -9.0, -2.0, -1.0, -3.0], [NORMAL] * 5))
    assert merges == [["b", "a"], ["a", "b"], ["ab", "a"], ["a", "ba"]]


def test_only_normal_tokens_are_merged() -> None:
    assert list(list_merges(["a", "b", "ab"], [0.0, 0.0, 0.0], [NORMAL, NORMAL, CONTROL])) == []


def test_files_of_sentencepiece(tmp_path: Path) -> None:
    files = tokenizer_files(MODEL, make_spm(), 128)
    made = json.loads(files["tokenizer.json"])
    assert made["model"]["merges"] == [["a", "b"], ["ab", "a"]]
    assert made["model"]["vocab"]["  "] == 7
    assert "[PAD8]" not in made["model"]["vocab"]
    assert [(t["id"], t["special"]) for t in made["added_tokens"]] == [
        (0, True),
        (1, True),
        (2, True),
        (7, False),
    ]
    single = made["post_processor"]["single"]
    assert [next(iter(part.values()))["id"] for part in single] == ["<s>", "A", "</s>"]
    (tmp_path / "tokenizer.model").write_bytes(files["tokenizer.model"])
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    assert len(model.pieces) == 8
    assert model.pieces[5] == (b"ab", -1.0, NORMAL)
    assert model.adds_space
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["model_max_length"]) == ("<s>", 128)


def test_a_long_piece_and_no_space(tmp_path: Path) -> None:
    piece = "ä".encode() * 300
    raw = write_sentencepiece([(piece, -0.5, CONTROL)], adds_space=False)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    assert model.pieces == ((piece, -0.5, CONTROL),)
    assert (model.is_unigram, model.adds_space, model.removes_spaces) == (False, False, False)


def test_several_templates_go_into_the_configuration() -> None:
    templates = {
        "tokenizer.chat_template": encode_value("one", "str"),
        "tokenizer.chat_template.tools": encode_value("two", "str"),
    }
    files = tokenizer_files(MODEL, make_spm() | templates, 128)
    assert "chat_template.jinja" not in files
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "one"},
        {"name": "tools", "template": "two"},
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": encode_value("bert", "str")}, "is of the kind 'bert'"),
        ({"tokens": encode_value(7, "u32")}, "has no tokens"),
        ({"scores": encode_value([0.0], "[f32]")}, "has no scores for every token"),
        ({"token_type": encode_value(["a"] * 9, "[str]")}, "has no token_type for every token"),
        ({"add_sep_token": encode_value(True, "bool")}, "puts a token between two texts"),
    ],
)
def test_what_cannot_be_written_is_refused(changes: dict[str, bytes], sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence) as caught:
        tokenizer_files(MODEL, make_spm(**changes), 128)
    assert "tokenizer_source" in str(caught.value)


def test_a_process_of_its_own_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokenizer_files(MODEL, make_spm(), 128)
    monkeypatch.setattr(written_process, "LARGE", 0)
    assert written_process.write_tokenizer(MODEL, make_spm(), 128) == expected
    with pytest.raises(FormatError, match=r"^model.gguf: its tokenizer is of the kind 'bert'"):
        written_process.write_tokenizer(MODEL, make_spm(model=encode_value("bert", "str")), 128)
