from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app

TEMPLATE = "{% if a %}\n\tred \x1b[31m{{ a }}\n{% endif %}"  # a tab, and ESC


def run(*arguments: str) -> Result:
    return CliRunner().invoke(make_app(), ["inspect", *arguments], prog_name="edgemerge")


def succeed(*arguments: str) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory with a mixture of experts that holds no tensors."""
    monkeypatch.chdir(tmp_path)
    writer = gguf.GGUFWriter("moe.gguf", "qwen3moe")
    writer.add_name("MoE")
    writer.add_block_count(2)
    writer.add_head_count(8)
    writer.add_head_count_kv([2, 4])
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_rope_freq_base(float("nan"))
    writer.add_file_type(24)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "\x1b[31m"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.add_uint32("quantize.imatrix.chunks_count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_all_of_a_header() -> None:
    text = succeed("moe.gguf")
    assert text.startswith(
        "MoE  (moe.gguf)\n"
        "  qwen3moe, 0.0 K parameters in 0 tensors, 0 bytes, 0.00 bits per parameter, IQ1_S\n"
        "  layers 2, width ?, heads 8 (2 to 4 by layer for keys and values) of ?, feed-forward ?, "
        "context ?\n"
        "  experts 8, of which a token uses 2: 0.0 K parameters are active\n"
        "  rope freq_base nan\n"
        "  tokenizer gpt2, 2 tokens\n"
        "  special tokens bos 1  [31m, eos 2 (unknown)\n"
        f"  chat template: {len(TEMPLATE)} characters, {{% if a %}}\n"
    )
    assert text.endswith(
        "What a merge would lose:\n"
        "  - slices can neither change the number of its layers nor re-order those that differ: it has "
        "settings per layer (qwen3moe.attention.head_count_kv)\n"
        "  - what tells how this file was made is left out (quantize.imatrix.chunks_count)\n"
    )


def test_a_terminal_gets_the_template_without_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda _self: True)
    assert succeed("moe.gguf", "--template") == "{% if a %}\n    red  [31m{{ a }}\n{% endif %}\n"


def test_a_file_gets_the_very_template() -> None:
    """What is redirected, edited and given to --template is to make the same prompts."""
    assert succeed("moe.gguf", "--template") == TEMPLATE
    (found,) = json.loads(succeed("moe.gguf", "--json"))["templates"]
    assert found == {"name": None, "length": len(TEMPLATE), "first_line": "{% if a %}"}
    (found,) = json.loads(succeed("moe.gguf", "--json", "--template"))["templates"]
    assert found["text"] == TEMPLATE


def test_keys_of_strangers_steer_no_terminal() -> None:
    writer = gguf.GGUFWriter("odd.gguf", "llama")
    writer.add_uint32("odd.\x1b[2J.key", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    text = succeed("odd.gguf", "--all")
    assert "\x1b" not in text
    assert "odd. [2J.key" in text


def test_no_template(models_dir: Path) -> None:
    result = run(str(models_dir / "base"), "--template")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"edgemerge: {models_dir / 'base'}: has no chat template; a recipe can give one "
        "(chat_template)\n"
    )


def test_json_has_it_all() -> None:
    document = json.loads(succeed("moe.gguf", "--json"))
    assert document["file_type"] == "IQ1_S"
    assert (document["experts"], document["experts_used"]) == (8, 2)
    assert document["kv_heads"] == [2, 4]
    assert document["rope"] == {"freq_base": "nan"}
    assert document["tokenizer"]["special"] == [
        {"role": "bos", "id": 1, "text": "\x1b[31m"},
        {"role": "eos", "id": 2, "text": None},
    ]
    assert len(document["losses"]) == 2
    assert "against" not in document


def test_against_a_base(models_dir: Path) -> None:
    base, expert = str(models_dir / "base"), str(models_dir / "expert-a")
    assert succeed(expert, "--against", base).endswith(
        f"\nA merge onto {base} would lose nothing.\n"
    )
    text = succeed("moe.gguf", "--against", base)
    assert f"\n\nA merge onto {base} would be refused:\n  - {base} is a llama model and " in text
    document = json.loads(succeed("moe.gguf", "--against", base, "--json"))
    assert document["against"]["path"] == base
    assert len(document["against"]["refused"]) == 1
    assert document["against"]["lost"] == []
