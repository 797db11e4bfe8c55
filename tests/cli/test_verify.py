"""`edgemerge verify`, `sign` and `keygen`, as a user has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from edgemerge.errors import OutputError
from tests.support.bits import flip_bit
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Path:
    """Work in a directory with two models and a pair of keys."""
    for name in "ab":
        (tmp_path / name).symlink_to(golden_dir / "inputs_f32" / name)
    monkeypatch.chdir(tmp_path)
    succeed("keygen", "ward")
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refuse(*arguments: object) -> str:
    """Return the one sentence in which a command ends."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("edgemerge: ").strip()


def merge(*options: object) -> str:
    return succeed("merge", "-m", "linear", "a", "b", "-o", "out.gguf", "--seed", "7", *options)


def test_it_says_what_made_the_file() -> None:
    merge()
    lines = succeed("verify", "out.gguf").splitlines()
    assert lines[0] == "out.gguf: all 21 tensors are as they were written"
    assert " of tensors, made by edgemerge " in lines[1]
    assert "seed 7" in lines[1]
    assert [line.split()[:2] for line in lines[2:4]] == [["input", "a,"], ["input", "b,"]]
    assert lines[4:7] == [
        "  linear: weight 1 (default), normalize on (default), seed 7",
        "  model a",
        "  model b",
    ]
    assert lines[7] == "  checksums find damage, not forgery: for that, sign it and give --key"


def test_json_has_it_all() -> None:
    merge()
    document = json.loads(succeed("verify", "out.gguf", "--json"))
    assert document["sound"] is True
    assert (document["tensors"], document["damaged"]) == (21, [])
    assert (document["method"], document["seed"]) == ("linear", 7)
    assert [model["name"] for model in document["inputs"]] == ["a", "b"]
    assert document["recipe"]["slices"][0]["inputs"][1]["path"] == "b"
    assert document["signature"] is None


def test_a_damaged_tensor_is_named() -> None:
    merge()
    flip_bit(Path("out.gguf"), 8 * (Path("out.gguf").stat().st_size - 100))
    assert refuse("verify", "out.gguf").startswith("out.gguf: 1 of 21 tensors changed since")
    result = invoke("verify", "out.gguf", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["sound"] is False
    assert len(document["damaged"]) == 1
    assert document["damaged"][0] in result.stderr


def test_what_cannot_be_verified() -> None:
    assert "has no provenance section" in refuse("verify", "a")
    assert "cannot be read" in refuse("verify", "absent.gguf")
    assert invoke("verify").exit_code == 2


def test_signed_by_a_merge_and_checked() -> None:
    assert merge("--sign", "ward.pem").endswith("  signed in out.gguf.sig\n")
    lines = succeed("verify", "out.gguf", "--key", "ward.pub.pem").splitlines()
    assert lines[-1].startswith("  signed, every byte, by the key ")
    document = json.loads(succeed("verify", "out.gguf", "--key", "ward.pub.pem", "--json"))
    assert document["signature"]["path"] == "out.gguf.sig"
    assert document["signature"]["key"] in lines[-1]


def test_a_missing_key_is_told_before_the_merge() -> None:
    arguments = ("merge", "-m", "linear", "a", "b", "-o", "new.gguf", "--sign", "absent.pem")
    assert "there is no such file" in refuse(*arguments)
    assert not Path("new.gguf").exists()


def test_a_signature_in_the_way_is_told_before_the_merge() -> None:
    Path("out.gguf.sig").touch()
    arguments = ("merge", "-m", "linear", "a", "b", "-o", "out.gguf", "--sign", "ward.pem")
    assert "out.gguf.sig: exists already" in refuse(*arguments)
    assert not Path("out.gguf").exists()
    document = json.loads(succeed(*arguments, "--force", "--json"))
    assert document["signature"] == "out.gguf.sig"


def test_a_signature_of_a_split_in_the_way_is_told_before_the_merge() -> None:
    split = ("--split-max-size", "10KiB", "--sign", "ward.pem")
    arguments = ("merge", "-m", "linear", "a", "b", "-o", "out.gguf", *split)
    succeed(*arguments)
    for part in Path().glob("out-*.gguf"):
        part.unlink()
    assert ".gguf.sig: exists already" in refuse(*arguments)
    assert not list(Path().glob("out-*.gguf"))
    succeed(*arguments, "--force")


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OutputError("is full", path="x.sig"), 1, "x.sig: is full"),
    ],
)
def test_what_stops_the_signing_leaves_the_merge_and_its_report(
    monkeypatch: pytest.MonkeyPatch, problem: BaseException, code: int, said: str
) -> None:
    def stop(*_given: object, **_named: object) -> None:
        raise problem

    monkeypatch.setattr("edgemerge.provenance.signature.sign_model", stop)
    merge = ("merge", "-m", "linear", "a", "b", "-o", "out.gguf", "--sign", "ward.pem")
    result = invoke(*merge)
    assert (result.exit_code, result.stderr) == (
        code,
        f"edgemerge: {said}; the merge is done, and out.gguf is whole\n",
    )
    assert result.stdout.startswith("out.gguf  48.8 KiB, F16, linear\n")
    assert "signed in" not in result.stdout
    assert succeed("verify", "out.gguf")


def test_what_stops_the_questions_leaves_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgemerge.cli.merge.ask_models", stop)
    result = invoke("merge", "-m", "linear", "a", "b", "-o", "out.gguf", "--ask", "x")
    assert result.exit_code == 130
    assert result.stderr == "edgemerge: interrupted; the merge is done, and out.gguf is whole\n"


def test_each_way_in_which_a_signature_does_not_hold() -> None:
    merge()
    verify = ("verify", "out.gguf", "--key", "ward.pub.pem")
    assert "has no signature" in refuse(*verify)
    assert succeed("sign", "out.gguf", "--key", "ward.pem").startswith("out.gguf.sig  signed with")
    assert "exists already" in refuse("sign", "out.gguf", "--key", "ward.pem")
    flip_bit(Path("out.gguf"), 8 * 200)  # metadata, which no checksum covers
    assert "is not what was signed" in refuse(*verify)
    flip_bit(Path("out.gguf"), 8 * 200)
    succeed(*verify)
    succeed("keygen", "other")
    assert "is a signature by the key" in refuse("verify", "out.gguf", "--key", "other.pub.pem")
    assert "is a private key" in refuse("verify", "out.gguf", "--key", "ward.pem")
    assert "is a public key" in refuse("sign", "out.gguf", "--key", "ward.pub.pem")
    assert "never replaced" in refuse("keygen", "ward")


def test_a_signed_model_that_nothing_merged() -> None:
    """It may be served, so its signature can be checked like any other."""
    write_tiny_gguf(Path("base.gguf"))
    assert "has no provenance section" in refuse("verify", "base.gguf")
    succeed("sign", "base.gguf", "--key", "ward.pem")
    assert succeed("verify", "base.gguf", "--key", "ward.pub.pem").startswith(
        "base.gguf: every byte is as it was signed by the key "
    )
    document = json.loads(succeed("verify", "base.gguf", "--key", "ward.pub.pem", "--json"))
    assert document["sound"] is True
    assert document["signature"]["path"] == "base.gguf.sig"
    flip_bit(Path("base.gguf"), 8 * 9000)
    assert "is not what was signed" in refuse("verify", "base.gguf", "--key", "ward.pub.pem")


def test_all_parts_of_a_split_are_signed_and_checked() -> None:
    merge("--split-max-size", "10KiB", "--sign", "ward.pem")
    parts = sorted(Path().glob("out-*.gguf"))
    assert len(parts) > 1
    line = f"{parts[0]} in {len(parts)} files: all 21 tensors are as they were written"
    for part in parts:
        assert succeed("verify", part, "--key", "ward.pub.pem").splitlines()[0] == line
    parts[1].unlink()
    assert parts[1].name in refuse("verify", parts[0], "--key", "ward.pub.pem")
    assert parts[1].name in refuse("verify", parts[0])


def test_without_cryptography_one_sentence_names_the_extra() -> None:
    hidden = "import sys; sys.modules['cryptography'] = None\n"
    command = [sys.executable, "-c", hidden + "from edgemerge.cli import main; main()"]
    for arguments in (
        ["keygen", "new"],
        ["sign", "x", "--key", "k"],
        ["verify", "x", "--key", "k"],
    ):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert done.stderr == (
            "edgemerge: signatures need cryptography: "
            "install it with pip install 'edgemerge[sign]'\n"
        )


def test_given_inputs_are_compared(golden_dir: Path) -> None:
    merge()
    given = ("--input", golden_dir / "inputs_f32" / "a", "--input", "b")
    text = succeed("verify", "out.gguf", *given)
    assert text.count(", as the given model's\n") == 2
    assert json.loads(succeed("verify", "out.gguf", *given, "--json"))["inputs_checked"] is True
    assert "b is missing" in refuse("verify", "out.gguf", *given[:2])
    Path("b").unlink()
    Path("b").symlink_to(golden_dir / "inputs_f32" / "base")
    assert refuse("verify", "out.gguf", *given).startswith("b: is not the input of that name")
