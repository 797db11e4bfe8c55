"""Tokenizers: the converter's stored results for SentencePiece, and each refusal and odd corner.

Those of byte-level BPE are compared whole in test_hub.
"""

import contextlib
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.tokenizer.bpe import LLAMA3_REGEX, QWEN2_REGEX, TEKKEN_REGEX
from edgemerge.formats.tokenizer.read import tokenizer_metadata
from tests.support.fixtures import unpacked
from tests.support.packed_json import read_packed_json
from tests.support.places import TESTS

HUB = TESTS / "data" / "hub"
BASE = unpacked("models") / "base"
EXPECTED = read_packed_json(HUB / "expected.json.xz")


def copy(tmp_path: Path, source: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(source / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def decoded(metadata: dict[str, bytes], key: str) -> Any:
    return get_value(metadata, f"tokenizer.ggml.{key}")


def check(found: dict[str, bytes], name: str, different: tuple[str, ...] = ()) -> None:
    expected = {k: v for k, v in EXPECTED[name]["metadata"].items() if k.startswith("tokenizer.")}
    assert list(found) == list(expected)
    for key, value in expected.items():
        raw = found[key]
        shown = f"sha256:{hashlib.sha256(raw).hexdigest()}" if len(raw) > 80 else raw.hex()
        assert (shown == value) != (key in different), key


# SentencePiece


def test_spm_with_added_tokens(tmp_path: Path) -> None:
    directory = copy(tmp_path, BASE, "tokenizer.model")
    added = {"0": "<unk>", "1": "<s>", "4096": "<|im_start|>", "4097": "a▁b"}
    write(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": True,
            "added_tokens_decoder": {
                i: {"content": text, "special": int(i) < 2} for i, text in added.items()
            },
            "bos_token": "<s>",
            "eos_token": "</s>",
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    write(directory / "added_tokens.json", {"<|im_start|>": 4096, "zz": 4100})
    config = {"bos_token_id": 1, "eos_token_id": 2}
    found = tokenizer_metadata(directory, config, 4112)
    check(found, "mistral_spm")
    assert decoded(found, "tokens")[4096:4101] == [
        "<|im_start|>",
        "a b",
        "[PAD4098]",
        "[PAD4099]",
        "zz",
    ]
    assert decoded(found, "token_type")[4096:4101] == [3, 4, 5, 5, 4]


def test_spm_from_tokenizer_json(tmp_path: Path) -> None:
    """Without tokenizer.model; only the scores differ from the converter's, on purpose."""
    directory = copy(tmp_path, BASE, "tokenizer.json", "tokenizer_config.json")
    config = {"bos_token_id": 1, "eos_token_id": 2}
    found = tokenizer_metadata(directory, config, 4096)
    check(found, "spm_json", different=("tokenizer.ggml.scores",))
    scores = decoded(found, "scores")
    theirs = tokenizer_metadata(copy(tmp_path, BASE, "tokenizer.model"), config, 4096)
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    made = {"".join(m.split(" ") if isinstance(m, str) else m) for m in merges}
    for token, ours, original in zip(
        decoded(found, "tokens"), scores, decoded(theirs, "scores"), strict=True
    ):
        assert ours == (original if token in made else 0.0)
    assert len(made) > 3000


def test_spm_json_pads_and_refuses(tmp_path: Path) -> None:
    directory = copy(tmp_path, BASE, "tokenizer.json", "tokenizer_config.json")
    found = tokenizer_metadata(directory, {}, 4098)
    assert decoded(found, "tokens")[-2:] == ["[PAD4096]", "[PAD4097]"]
    assert decoded(found, "token_type")[-2:] == [5, 5]
    with pytest.raises(FormatError, match="more tokens than the 4095 rows"):
        tokenizer_metadata(directory, {}, 4095)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: bytes, score: float = -1.5, kind: int | None = None) -> bytes:
    body = field(1, text) + field(2, score) + (field(3, kind) if kind else b"")
    return field(1, body)


def test_spm_protobuf(tmp_path: Path) -> None:
    """Types, defaults, unknown fields of every wire type, pieces out of order with other fields."""
    raw = piece(b"<unk>", 0.0, 2) + piece("▁a".encode()) + field(2, field(3, 2)) + field(9, 300)
    raw += varint(10 << 3 | 1) + bytes(8) + field(11, 0.5)
    raw += (
        piece(b"u", kind=4)
        + piece(b"x", kind=5)
        + piece(b"<0x00>", kind=6)
        + field(1, field(1, b"d"))
    )
    (tmp_path / "tokenizer.model").write_bytes(raw)
    found = tokenizer_metadata(tmp_path, {}, 6)
    assert decoded(found, "tokens") == ["<unk>", "▁a", "u", "x", "<0x00>", "d"]
    assert decoded(found, "token_type") == [2, 1, 1, 5, 6, 1]
    assert decoded(found, "scores") == [0.0, -1.5, -1.5, -1.5, -1.5, 0.0]
    with pytest.raises(FormatError, match="gives 'u' the id 2, but the embedding has 2 rows"):
        tokenizer_metadata(tmp_path, {}, 2)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is empty"),
        (b"IQ== 0\nIg== 1\n", "is not a SentencePiece file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS"),
        (piece(b"ab")[:-2], "a field is longer"),
        (b"\n\x02\x0a", "a field is longer"),
        (piece(b"\xff\xfe"), "damaged"),
        (piece(b"a", kind=9), "type 9"),
        (piece(b"a") + b"\x0b", "wire type 3"),
        (piece(b"a") + b"\xff" * 12, "ten bytes"),
        (piece(b"a") + b"\x80", "damaged"),
        (piece(b"a") + b"\x11\0", "cut short"),
        (piece(b"a") + b"\x15\0", "damaged"),
    ],
)
def test_bad_tokenizer_model(tmp_path: Path, raw: bytes, says: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(FormatError, match=says):
        tokenizer_metadata(tmp_path, {}, 4)


@given(data=st.binary(max_size=50), keep=st.integers(0, 40))
def test_random_protobuf_raises_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, keep: int
) -> None:
    directory = tmp_path_factory.mktemp("t")
    raw = (piece(b"<unk>", 0.0, 2) + piece(b"ab") + piece(b"cd"))[:keep]
    (directory / "tokenizer.model").write_bytes(b"\n" + raw[1:] + data)
    with contextlib.suppress(FormatError):
        assert len(decoded(tokenizer_metadata(directory, {}, 4), "tokens")) == 4


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        tokenizer_metadata(tmp_path, {}, 4)


def test_codellama_and_granite_rules(tmp_path: Path) -> None:
    directory = copy(tmp_path, BASE, "tokenizer.model")
    assert decoded(tokenizer_metadata(directory, {}, 32016), "eot_token_id") == 32010
    assert decoded(tokenizer_metadata(directory, {}, 49152), "add_bos_token") is False


# Byte-level BPE

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def bpe(pre: dict | None = GPT2, **changes: object) -> dict:
    model: dict[str, Any] = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": [["a", "b"]],
    }
    tokenizer: dict[str, Any] = {
        "pre_tokenizer": pre,
        "normalizer": None,
        "added_tokens": [],
        "model": model,
    }
    for key, value in changes.items():
        (
            model
            if key in ("type", "vocab", "merges", "ignore_merges", "byte_fallback")
            else tokenizer
        )[key] = value
    return tokenizer


def load(
    tmp_path: Path, tokenizer: object, config: object = None, size: int = 4
) -> dict[str, bytes]:
    write(tmp_path / "tokenizer.json", tokenizer)
    if config is not None:
        write(tmp_path / "tokenizer_config.json", config)
    return tokenizer_metadata(tmp_path, {}, size)


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        (sequence(split(LLAMA3_REGEX), BYTES), True, "llama-bpe"),
        (sequence(split(LLAMA3_REGEX, "Removed", True), BYTES), True, "llama-bpe"),
        (sequence(split(LLAMA3_REGEX), BYTES), False, "smaug-bpe"),
        (sequence(split(QWEN2_REGEX), BYTES), False, "qwen2"),
        (sequence(split(TEKKEN_REGEX), BYTES), False, "tekken"),
        (sequence(split(TEKKEN_REGEX), BYTES), True, "tekken"),
        (sequence(DIGITS, GPT2), False, "smollm"),
        (GPT2, False, "gpt-2"),
        (sequence(sequence(GPT2)), False, "gpt-2"),
        (
            sequence(
                split("[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split("[一-龥ࠀ-一가-\ud7ff]+"),
                DIGITS,
                BYTES,
            ),
            False,
            "deepseek-coder",
        ),
    ],
)
def test_pre_tokenizer(tmp_path: Path, pre: dict, ignore_merges: bool, name: str) -> None:
    found = load(tmp_path, bpe(pre, ignore_merges=ignore_merges))
    assert decoded(found, "pre") == name
    assert decoded(found, "model") == "gpt2"


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (bpe(None), r"cuts text in a way \(none\)"),
        (bpe({"type": "Whitespace"}), "Whitespace"),
        (bpe(sequence(split("[a-z]+"), BYTES)), "Split, ByteLevel"),
        (bpe(sequence(split(LLAMA3_REGEX, "Removed"), BYTES)), "Split"),
        (bpe(sequence(split(LLAMA3_REGEX), GPT2)), "Split, ByteLevel"),
        (bpe({"type": "ByteLevel"}), "ByteLevel"),
        (bpe(GPT2 | {"add_prefix_space": True}), "ByteLevel"),
        (bpe(GPT2, ignore_merges=True), "ByteLevel"),
        (bpe(sequence({"type": "Digits", "individual_digits": False}, GPT2)), "Digits"),
        (bpe(normalizer={"type": "Lowercase"}), "normalises text by Lowercase"),
        (bpe(type="WordPiece"), "'WordPiece'"),
        (bpe(type="Unigram"), "its Unigram tokenizer cuts text by ByteLevel"),
        (bpe(type="Unigram", byte_fallback=True), "a Unigram that spells unknown characters"),
        (bpe(byte_fallback=True), "not a byte-level BPE"),
        (bpe(vocab={"a": 4}), "the embedding has 4 rows"),
        (bpe(vocab={"a": -1}), "the id -1"),
        (bpe(vocab={"a": "0"}), "the id 0"),
        (bpe(vocab={"a": 1, "b": 1}), "two tokens, 'a' and 'b'"),
        (bpe(added_tokens=[{"id": 9, "content": "x"}]), "the embedding has 4 rows"),
        (bpe(merges=[["a"]]), "in a way edgemerge does not know"),
        (bpe(merges=7), "in a way edgemerge does not know"),
        (bpe(vocab=[]), "in a way edgemerge does not know"),
        ({"model": 3}, "in a way edgemerge does not know"),
        ({}, "in a way edgemerge does not know"),
        ([], "not an object"),
    ],
)
def test_refused_tokenizer_json(tmp_path: Path, tokenizer: object, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        load(tmp_path, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [2_000, 50_000])
def test_deeply_nested_pre_tokenizer(tmp_path: Path, depth: int) -> None:
    text = json.dumps(bpe({"type": "here"}))
    nested = '{"type":"Sequence","pretokenizers":[' * depth + json.dumps(GPT2) + "]}" * depth
    (tmp_path / "tokenizer.json").write_text(text.replace('{"type": "here"}', nested))
    with pytest.raises(FormatError, match=r"too deeply|does not know"):
        tokenizer_metadata(tmp_path, {}, 4)


def test_bpe_tokens_types_and_merges(tmp_path: Path) -> None:
    added = [
        {"id": 2, "content": "ab", "special": False},
        {"id": 3, "content": "<|end|>", "special": False},
        {"id": 4, "content": "x▁y", "special": False},
        {"id": 5, "content": "<s>", "special": False},
    ]
    merges = [["a", "b"], ["a b", "c"], "a b"]
    config = {"added_tokens_decoder": {"5": {"content": "<s>", "special": True}}}
    found = load(tmp_path, bpe(added_tokens=added, merges=merges), config, size=8)
    assert decoded(found, "tokens") == ["a", "b", "ab", "<|end|>", "x y", "<s>", "[PAD6]", "[PAD7]"]
    assert decoded(found, "token_type") == [1, 1, 4, 3, 4, 3, 5, 5]
    assert decoded(found, "merges") == ["a b", "aĠb c", "a b"]


def test_trainer_spec_in_two_parts(tmp_path: Path) -> None:
    """Protobuf adds the parts of one message up; tools/make_tiny_model.py relies on it."""
    directory = copy(tmp_path, BASE, "tokenizer.model")
    config = json.loads((BASE / "config.json").read_text())
    want = tokenizer_metadata(directory, config, 4096)
    with (directory / "tokenizer.model").open("ab") as file:
        file.write(b"\x12\x03\x20\x80\x20")  # trainer_spec.vocab_size = 4096
    assert tokenizer_metadata(directory, config, 4096) == want
