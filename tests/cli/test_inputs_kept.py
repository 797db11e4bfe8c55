"""No file that a merge reads is its output, whatever it is given for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.provenance.keys import create_keys


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Path:
    (tmp_path / "a").symlink_to(golden_dir / "inputs_f32" / "a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), list(arguments), prog_name="edgemerge")
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr.removeprefix("edgemerge: ").rstrip("\n")


@pytest.mark.parametrize(
    "link", [Path, Path.hardlink_to, Path.symlink_to], ids=["path", "hard", "soft"]
)
def test_no_input_of_any_kind_is_overwritten(folder: Path, link: Any) -> None:
    """`--imatrix X -o X --force` replaced X by the merge."""
    create_keys("key")
    Path("imatrix").write_text("precious")
    Path("recipe.yml").write_text(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    )
    for name in ("imatrix", "recipe.yml", "key.pem"):
        text = Path(name).read_text()
        target = name if link is Path else f"link-{name}"
        if link is not Path:
            link(Path(target), folder / name)
        given = ("--imatrix", "imatrix", "--sign", "key.pem", "--force")
        message = refuse("merge", "recipe.yml", *given, "-o", target)
        assert message == f"{target}: is one of the inputs; choose another name"
        message = refuse("merge", "recipe.yml", *given, "-o", "new.gguf", "--report", target)
        assert message == f"{target}: is one of the inputs; choose another name"
        assert Path(name).read_text() == text
    assert not Path("new.gguf").exists()


def test_an_importance_matrix_is_no_output_of_convert(folder: Path) -> None:
    Path("imatrix").write_text("precious")
    message = refuse("convert", "a", "--imatrix", "imatrix", "-o", "imatrix", "--force")
    assert message == "imatrix: is one of the inputs; choose another name"
    assert Path("imatrix").read_text() == "precious"
