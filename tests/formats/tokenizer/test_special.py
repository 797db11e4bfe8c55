"""Special tokens and chat templates: what `SpecialVocab` of llama.cpp's gguf-py finds."""

import json
from pathlib import Path

import pytest

from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.tokenizer.special import chat_templates, special_tokens

ADDED = [{"id": i, "content": c} for i, c in enumerate(["<s>", "</s>", "<pad>", "<eot>", "[SEP]"])]


def template(single: str, pair: str = "") -> dict:
    def items(text: str) -> list[dict]:
        return [
            {"Sequence": {"id": t[1:]}} if t[0] == "$" else {"SpecialToken": {"id": t}}
            for t in text.split()
        ]

    return {"type": "TemplateProcessing", "single": items(single), "pair": items(pair)}


@pytest.mark.parametrize(
    ("post", "config", "ids", "adds"),
    [
        (None, {"bos_token": "<s>", "add_bos_token": True}, {"bos": 0}, {"bos": True}),
        (None, {"eos_token": {"content": "</s>"}}, {"eos": 1}, {}),
        (None, {"eos_token": {"content": 3}, "pad_token": None}, {}, {}),
        ({"type": "ByteLevel"}, {"add_bos_token": True}, {}, {"bos": False, "eos": False}),
        (template("<s> $A"), {"bos_token": "<s>"}, {"bos": 0}, {"bos": True}),
        (template("<s> $A"), {"bos_token": "</s>"}, {"bos": 1, "cls": 0}, {"bos": True}),
        (
            template("$A </s>"),
            {"eos_token": "<eot>"},
            {"eos": 1, "eot": 3},
            {"eos": True},
        ),
        (
            template("<s> $A </s>", "<s> $A </s> $B </s>"),
            None,
            {},
            {"bos": True, "eos": True, "sep": False},
        ),
        (
            template("<s> $A", "<s> $A [SEP] $B"),
            {"sep_token": "[SEP]", "bos_token": "<s>"},
            {"bos": 0, "eos": 4, "sep": 4},
            {"bos": True, "sep": True},
        ),
        (
            template("$A </s>", "$A </s> </s> $B </s>"),
            {"eos_token": "</s>"},
            {"eos": 1, "sep": 1},
            {"eos": True, "sep": True},
        ),
        (
            {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 1]},
            {},
            {"cls": 0, "sep": 1},
            {"bos": True, "eos": True, "sep": True},
        ),
        (
            {"type": "Sequence", "processors": [template("<s> $A")]},
            {"cls_token": "<s>"},
            {"bos": 0, "cls": 0},
            {"bos": True},
        ),
    ],
)
def test_special_tokens(post: dict | None, config: dict | None, ids: dict, adds: dict) -> None:
    tokenizer = {"post_processor": post, "added_tokens": ADDED}
    assert special_tokens(tokenizer, config, {}, None) == (ids, adds)


def test_special_ids_of_config_json() -> None:
    config = {"bos_token_id": 7, "eos_token_id": [1, 2], "pad_token_id": None, "unk_token_id": 99}
    assert special_tokens(None, None, config, 50) == ({"bos": 7}, {})
    assert special_tokens(None, {"bos_token": "<s>"}, config, None)[0] == {"bos": 7, "unk": 99}
    with pytest.raises(ValueError, match="-1"):
        special_tokens(None, None, {"bos_token_id": -1}, None)


def test_chat_templates(tmp_path: Path) -> None:
    def keys(config: dict | None) -> dict[str, object]:
        found = chat_templates(tmp_path, config)
        return {key: get_value(found, key) for key in found}

    assert keys(None) == {}
    assert keys({}) == {}
    assert keys({"chat_template": 3}) == {}
    assert keys({"chat_template": "x"}) == {"chat_template": "x"}
    named = [{"name": "a b", "template": "T"}, {"name": "default", "template": "D"}, {"name": "n"}]
    assert keys({"chat_template": named}) == {
        "chat_template.a_b": "T",
        "chat_templates": ["a_b"],
        "chat_template": "D",
    }
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert keys({}) == {"chat_template": "from json"}
    (tmp_path / "chat_template.jinja").write_text("{{ évil }}")
    assert keys({}) == {"chat_template": "{{ évil }}"}
    for older in ("inline", None):
        assert keys({"chat_template": older}) == {"chat_template": "{{ évil }}"}
    assert keys(None) == {"chat_template": "{{ évil }}"}
