from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from tests.support.small_models import stored


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), list(arguments))
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize(
    ("dtype", "file_type", "embedding"),
    [
        ("F32", "ALL_F32", "F32"),
        ("F16", "MOSTLY_F16", "F16"),
        ("BF16", "MOSTLY_BF16", "BF16"),
        ("Q8_0", "MOSTLY_Q8_0", "Q8_0"),
        ("Q6_K", "MOSTLY_Q6_K", "Q6_K"),
        ("Q5_K_M", "MOSTLY_Q5_K_M", "Q6_K"),
        ("Q4_K_M", "MOSTLY_Q4_K_M", "Q6_K"),
        ("Q4_0", "MOSTLY_Q4_0", "Q6_K"),
    ],
)
def test_convert_to_every_type(
    models_dir: Path, dtype: str, file_type: str, embedding: str
) -> None:
    given = ("convert", str(models_dir / "base"), "-o", "out.gguf", "--type", dtype, "--json")
    assert json.loads(run(*given))["file_type"] == dtype
    reader = gguf.GGUFReader("out.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[file_type]
    assert stored(Path("out.gguf"))["token_embd.weight"][0] == embedding


def test_converting_without_a_type_keeps_quantised_bytes(models_dir: Path) -> None:
    run("convert", str(models_dir / "base"), "-o", "q4.gguf", "--type", "Q4_K_M")
    run("convert", "q4.gguf", "-o", "again.gguf")
    assert stored(Path("again.gguf")) == stored(Path("q4.gguf"))
    expert = str(models_dir / "expert-a")
    text = run("merge", "-m", "linear", "q4.gguf", expert, "-o", "mixed.gguf")
    assert text.startswith("mixed.gguf  2.2")
    assert {n: t for n, (t, _) in stored(Path("mixed.gguf")).items()} == {
        n: t for n, (t, _) in stored(Path("q4.gguf")).items()
    }
