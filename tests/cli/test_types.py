"""Types for single tensors, from the command line and from a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from tests.support.small_models import stored


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), [str(argument) for argument in arguments])


def types(path: str) -> dict[str, str]:
    return {name: dtype for name, (dtype, _) in stored(Path(path)).items()}


def test_convert_merge_and_recipe_choose_types_alike(models_dir: Path) -> None:
    base, expert = models_dir / "base", models_dir / "expert-a"
    flags = ("--type", "Q4_0", "--tensor-type", "attn_v=q8_0", "--tensor-type", "attn=Q4_1")
    assert invoke("convert", base, "-o", "one.gguf", *flags).exit_code == 0
    assert invoke("merge", "-m", "linear", base, expert, "-o", "two.gguf", *flags).exit_code == 0
    Path("r.yml").write_text(
        "merge_method: linear\n"
        f"models: [{{model: {base}, parameters: {{weight: 1}}}}, "
        f"{{model: {expert}, parameters: {{weight: 1}}}}]\n"
        "edgemerge: {type: Q4_0, tensor_types: {attn_v: q8_0, attn: Q4_1}}\n"
    )
    assert invoke("merge", "r.yml", "-o", "three.gguf").exit_code == 0
    chosen = types("one.gguf")
    assert chosen["blk.0.attn_v.weight"] == "Q8_0"
    assert chosen["blk.0.attn_q.weight"] == chosen["blk.1.attn_output.weight"] == "Q4_1"
    assert chosen["blk.0.attn_norm.weight"] == "F32"
    assert chosen["blk.0.ffn_up.weight"] == "Q4_0"
    assert types("two.gguf") == types("three.gguf") == chosen


def test_plan_says_which_pattern_chose_nothing(models_dir: Path) -> None:
    given = ("plan", "-m", "passthrough", models_dir / "base", "--json", "--type", "Q4_0")
    result = json.loads(invoke(*given, "--tensor-type", "atn_v=Q8_0").stdout)
    assert result["notes"] == ["no tensor's type was chosen by 'atn_v'"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--type", "Q4_0", "--tensor-type", "attn_v"), 2, "must be PATTERN=TYPE"),
        (("--type", "Q4_0", "--tensor-type", "=Q8_0"), 2, "must be PATTERN=TYPE"),
        (("--type", "Q4_0", "--tensor-type", "attn_v=Q9"), 1, "cannot be written as 'Q9'"),
        (("--type", "Q4_0", "--tensor-type", "attn(=Q8_0"), 1, "no regular expression"),
        (("--type", "F16", "--tensor-type", "attn_v=Q8_0"), 1, "a quantised type, not F16"),
        (("--type", "keep", "--tensor-type", "attn_v=Q8_0"), 1, "a quantised type, not keep"),
    ],
)
def test_refusals(models_dir: Path, flags: tuple[str, ...], code: int, message: str) -> None:
    result = invoke("convert", models_dir / "base", "-o", "out.gguf", *flags)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert not Path("out.gguf").exists()


def test_a_recipe_names_the_key_that_is_wrong(models_dir: Path) -> None:
    Path("r.yml").write_text(
        f"merge_method: passthrough\nmodels: [{{model: {models_dir / 'base'}}}]\n"
        "edgemerge: {type: Q4_0, tensor_types: [attn_v]}\n"
    )
    result = invoke("plan", "r.yml")
    assert result.exit_code == 1
    assert "edgemerge.tensor_types must be a table" in result.stderr
