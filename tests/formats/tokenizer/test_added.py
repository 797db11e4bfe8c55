"""Tokens added by a fine-tune: on every path special where the files say so, and never `[PADn]`."""

import json
import shutil
from pathlib import Path

import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.tokenizer.read import tokenizer_metadata
from edgemerge.runtime.llama import Model
from tests.support.architecture_models import convert
from tests.support.odd_directories import (
    ARCHITECTURES,
    BASE,
    CHATML,
    EXPECTED,
    SPECIAL,
    TEXT,
    edit_json,
    with_tokens,
)
from tests.support.places import TESTS

TOKENS = json.loads(EXPECTED.read_text())["tokens"]
UNIGRAM = TESTS / "data" / "tokenizers" / "unigram"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def metadata(folder: Path, notes: list[str] | None = None) -> dict[str, bytes]:
    config = json.loads((folder / "config.json").read_text())
    return tokenizer_metadata(
        folder, config, config["vocab_size"], config["model_type"], notes=notes
    )


def types(found: dict[str, bytes]) -> dict[str, int]:
    tokens = get_value(found, "tokenizer.ggml.tokens")
    kinds = get_value(found, "tokenizer.ggml.token_type")
    assert isinstance(tokens, Array)
    assert isinstance(kinds, Array)
    return {str(token): int(kind) for token, kind in zip(tokens, kinds, strict=True)}


@pytest.fixture(params=["spm", "spm_beside_json", "bpe"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """What is expected, and a directory as transformers 5 saves it."""
    kind = request.param
    source = ARCHITECTURES / "llama" if kind == "bpe" else BASE
    folder = with_tokens(source, tmp_path / kind)
    if kind == "spm":
        (folder / "tokenizer.model").unlink()
    return kind.partition("_")[0], folder


def test_special_tokens_of_transformers_5_are_control_tokens(case: tuple[str, Path]) -> None:
    expected = TOKENS[case[0]]
    found = metadata(case[1])
    assert {text: types(found)[text] for text in expected["types"]} == expected["types"]
    assert get_value(found, "tokenizer.ggml.eos_token_id") == expected["eos_token_id"]
    assert get_value(found, "tokenizer.chat_template") == expected["template"] == CHATML
    if case[0] == "spm":
        assert types(found)["</s>"] == CONTROL


def test_ids_are_those_of_transformers_and_plain_text_no_control_token(
    case: tuple[str, Path], tmp_path: Path
) -> None:
    expected = TOKENS[case[0]]
    with Model(convert(case[1], tmp_path / "model.gguf"), n_threads=1) as model:
        found, wanted = model.tokenize(TEXT, special=True), expected["ids"]
        if (
            case[0] == "spm"
        ):  # llama.cpp puts a space after a special token, transformers 5 does not
            added = {i for i in wanted if i >= 4096}
            found, wanted = ([i for i in ids if i in added] for ids in (found, wanted))
        assert found == wanted
        ids = {model.tokenize(text, special=True)[-1] for text in SPECIAL}
        assert len(ids) == 3
        assert not ids & set(model.tokenize(TEXT, special=False))


def test_extra_special_tokens_are_special_whatever_tokenizer_json_says(
    case: tuple[str, Path],
) -> None:
    folder = case[1]
    edit_json(
        folder / "tokenizer_config.json",
        extra_special_tokens={"tool_token": "Section5A"},
        additional_special_tokens=[{"content": "<think>"}],
    )
    found = types(metadata(folder))
    assert (found["Section5A"], found["<think>"], found["</think>"]) == (3, 3, 4)


def test_unigram_joins_both_files(tmp_path: Path) -> None:
    shutil.copytree(UNIGRAM, tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    n = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] += [
        {"id": n, "content": "<|end|>", "special": True},
        {"id": n + 1, "content": "Section5A", "special": False},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for _ in ("with tokenizer.model", "without"):
        found = types(tokenizer_metadata(tmp_path, {"eos_token_id": n}, n + 3))
        assert (found["<|end|>"], found["Section5A"], found[f"[PAD{n + 2}]"]) == (3, 4, UNUSED)
        (tmp_path / "tokenizer.model").unlink(missing_ok=True)


def test_an_end_of_text_without_text_is_refused(case: tuple[str, Path]) -> None:
    folder = case[1]
    edit_json(folder / "config.json", vocab_size=4200, eos_token_id=4150)
    edit_json(folder / "tokenizer_config.json", eos_token=...)
    with pytest.raises(FormatError, match="its eos token has the id 4150, to which its tokenizer"):
        metadata(folder)


def test_a_special_id_beyond_the_embedding_is_refused(case: tuple[str, Path]) -> None:
    folder = case[1]
    edit_json(folder / "config.json", pad_token_id=5000)
    edit_json(folder / "tokenizer_config.json", pad_token=...)
    with pytest.raises(FormatError, match="its pad token has the id 5000, but the embedding has"):
        metadata(folder)


def test_an_added_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    for name, source in (("spm", BASE), ("bpe", ARCHITECTURES / "llama")):
        folder = with_tokens(source, tmp_path / name, grows=False)
        for _ in ("with tokenizer.model", "without"):
            with pytest.raises(FormatError, match=r"but the embedding has \d+ rows; take the"):
                metadata(folder)
            (folder / "tokenizer.model").unlink(missing_ok=True)


def test_the_image_token_that_small_gemmas_have_no_row_for_is_left_out(tmp_path: Path) -> None:
    folder = shutil.copytree(ARCHITECTURES / "gemma3", tmp_path / "gemma")
    n = json.loads((folder / "config.json").read_text())["vocab_size"]
    token = {"content": "<image_soft_token>", "special": True}
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder | {str(n): token})
    notes: list[str] = []
    assert "<image_soft_token>" not in types(metadata(folder, notes))
    assert notes == ["token '<image_soft_token>' is left out, as the embedding has no row for it"]
    (folder / "added_tokens.json").write_text(json.dumps({"<image_soft_token>": n}))
    assert "<image_soft_token>" not in types(metadata(folder, []))
    (folder / "added_tokens.json").write_text(json.dumps({"<other>": n}))
    with pytest.raises(FormatError, match="but the embedding has"):
        metadata(folder, [])


def test_a_padding_id_of_minus_one_is_none(tmp_path: Path) -> None:
    folder = shutil.copytree(ARCHITECTURES / "mistral", tmp_path / "m")
    edit_json(folder / "config.json", pad_token_id=-1)
    notes: list[str] = []
    found = metadata(folder, notes)
    assert "tokenizer.ggml.padding_token_id" not in found
    assert notes == ["pad_token_id -1 of config.json is taken for none"]


def test_an_older_chat_template_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = shutil.copytree(ARCHITECTURES / "llama", tmp_path / "m")
    said = "chat_template.jinja counts, not the other template in tokenizer_config.json"
    for older, expected in ((CHATML, []), ("old", [said])):
        (folder / "chat_template.jinja").write_text(CHATML)
        edit_json(folder / "tokenizer_config.json", chat_template=older)
        notes: list[str] = []
        found = metadata(folder, notes)
        assert get_value(found, "tokenizer.chat_template") == CHATML
        assert notes == expected
    (folder / "tokenizer_config.json").unlink()
    assert get_value(metadata(folder), "tokenizer.chat_template") == CHATML
