"""Split models in and out, as a user has them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from tests.support.small_models import stored


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), [str(argument) for argument in arguments])


def converted(*arguments: object) -> dict[str, object]:
    result = invoke("convert", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return dict(json.loads(result.stdout))


@pytest.mark.llama
def test_llama_cpp_loads_a_split_by_any_part(models_dir: Path, folder: Path) -> None:
    from edgemerge.runtime.llama import Model

    converted(models_dir / "base", "-o", "cut.gguf", "--split-max-size", "3MiB")
    for path in sorted(folder.glob("cut-*")):
        with Model(path) as model:
            assert model.n_layers > 0
    path.unlink()
    result = invoke("run", "cut-00001-of-00003.gguf", "-p", "x")
    assert result.exit_code == 1
    assert result.stderr == (
        "edgemerge: cut-00001-of-00003.gguf: is part 1 of a split of 3, and beside it there is no "
        f"{path.name}; get the missing parts, under these names\n"
    )


def test_out_and_in_again(models_dir: Path, folder: Path) -> None:
    whole = converted(models_dir / "base", "-o", "whole.gguf", "--type", "Q8_0")
    split = converted(
        models_dir / "base", "-o", "cut.gguf", "--type", "Q8_0", "--split-max-size", "1.2MiB"
    )
    paths = sorted(folder.glob("cut-*"))
    count = len(paths)
    assert count > 2
    assert [path.name for path in paths] == [
        f"cut-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)
    ]
    assert split["output"] == paths[0].name
    assert split["out_bytes"] == sum(path.stat().st_size for path in paths)
    assert split["files"] == [
        {
            "path": path.name,
            "n_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    ]
    together = hashlib.sha256(b"".join(path.read_bytes() for path in paths))
    assert split["sha256"] == together.hexdigest()
    assert whole["files"] == []
    merged = {name: tensor for path in paths for name, tensor in stored(path).items()}
    assert merged == stored(Path("whole.gguf"))
    for path in paths:
        assert sum(t.n_bytes for t in gguf.GGUFReader(path).tensors) <= 1.2 * (1 << 20)
    again = converted(paths[1], "-o", "again.gguf")
    assert stored(Path("again.gguf")) == stored(Path("whole.gguf"))
    twice = converted(paths[0], "-o", "twice.gguf")
    assert twice["sha256"] == again["sha256"]  # whichever part names the model
    assert "split.count" not in gguf.GGUFReader("again.gguf").fields
    assert gguf.GGUFReader("again.gguf").fields["general.name"].contents() == "cut"


def test_a_model_that_fits_is_one_part(models_dir: Path, folder: Path) -> None:
    report = converted(models_dir / "base", "-o", "cut.gguf", "--split-max-size", "1GiB")
    assert report["output"] == "cut-00001-of-00001.gguf"
    assert [path.name for path in folder.iterdir()] == ["cut-00001-of-00001.gguf"]
    assert invoke("inspect", "cut-00001-of-00001.gguf").exit_code == 0


def test_existing_parts_are_replaced_with_force_only(models_dir: Path, folder: Path) -> None:
    arguments = (models_dir / "base", "-o", "cut.gguf", "--type", "Q8_0", "--split-max-size", "2M")
    converted(*arguments)
    paths = sorted(folder.iterdir())
    paths[0].unlink()
    before = paths[1].read_bytes()
    paths[1].write_bytes(b"precious")
    result = invoke("convert", *arguments)
    assert result.exit_code == 1
    assert f"{paths[1].name}: exists already" in result.stderr
    assert sorted(folder.iterdir()) == paths[1:]
    converted(*arguments, "--force")
    assert sorted(folder.iterdir()) == paths
    assert paths[1].read_bytes() == before


def test_no_part_of_an_input_is_ever_written(models_dir: Path, folder: Path) -> None:
    arguments = ("-o", "cut.gguf", "--type", "Q8_0", "--split-max-size", "1MiB", "--force")
    converted(models_dir / "base", *arguments)
    second = sorted(folder.iterdir())[1]
    for output in (("-o", second), arguments):
        result = invoke("convert", "cut-00001-of-" + second.name[-10:], *output, "--force")
        assert result.exit_code == 1
        assert "is one of the inputs" in result.stderr


def test_too_many_files_are_refused(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemerge.merging.destination.MAX_PARTS", 2)
    result = invoke("convert", models_dir / "base", "-o", "cut.gguf", "--split-max-size", "1K")
    assert result.exit_code == 1
    assert "allow larger ones with --split-max-size" in result.stderr


@pytest.mark.llama
def test_llama_loads_it(models_dir: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    report = converted(
        models_dir / "base", "-o", "cut.gguf", "--type", "Q8_0", "--split-max-size", "1MiB"
    )
    model = llama_cpp.Llama(str(report["output"]), n_ctx=64, verbose=False)
    assert model.create_completion("The", max_tokens=2, temperature=0)["choices"]
    model.close()
