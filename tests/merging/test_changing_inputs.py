"""Inputs that change, shrink or fail while a merge reads them: no output of two models at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge import merge, open_model
from edgemerge.errors import FormatError
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Recipe
from tests.support.crashing import write_models
from tests.support.imatrix_files import write_old

CHANGED = "was changed while it was read; let nothing write to it and start again"


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")  # of a float32: a number that is too large for the output


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path)


CHANGES = [write_in_place, grow, shrink, touch]


def weights_of(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_models(folder)


@pytest.fixture
def recipe(models: dict[str, str]) -> Recipe:
    return make_recipe("linear", [(models["a"], None), (models["b"], None)], out_type="F16")


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_is_noticed(
    models: dict[str, str], change: Callable[[Path], None]
) -> None:
    source = open_model(models["a"])
    source.check_unchanged()
    change(Path(models["a"]))
    with pytest.raises(FormatError, match=CHANGED) as caught:
        source.check_unchanged()
    assert caught.value.path == Path(models["a"])
    source.close()


def test_a_shard_that_changes_is_noticed(models_dir: Path, tmp_path: Path) -> None:
    for file in (models_dir / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    source = open_model(tmp_path)
    source.check_unchanged()
    shard = next(tmp_path.glob("*.safetensors"))
    touch(shard)
    with pytest.raises(FormatError, match=CHANGED) as caught:
        source.check_unchanged()
    assert caught.value.path == shard
    source.close()


def test_an_importance_matrix_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    write_old(path, {"blk.0.ffn_up.weight": np.ones(256, np.float32)})
    matrix = ImportanceMatrix(path)
    matrix.check_unchanged()
    touch(path)
    with pytest.raises(FormatError, match=CHANGED):
        matrix.check_unchanged()
    matrix.close()


def test_a_file_that_is_replaced_is_read_to_its_end(
    recipe: Recipe, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merge(recipe, tmp_path / "expected.gguf").sha256

    def replace() -> None:
        os.unlink(models["a"])
        Path(models["a"]).write_bytes(b"another")

    change_at_read(monkeypatch, 3, replace)
    assert merge(recipe, tmp_path / "out.gguf").sha256 == expected


def change_at_read(monkeypatch: pytest.MonkeyPatch, number: int, change: Callable[[], Any]) -> None:
    """Let something happen just after so many reads of data."""
    read, n_reads = os.preadv, 0

    def preadv(*arguments: Any) -> int:
        nonlocal n_reads
        n_read = read(*arguments)
        n_reads += 1
        if n_reads == number:
            change()
        return n_read

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", [1, 7, 22])
def test_no_output_is_made_of_a_file_that_changes(
    recipe: Recipe,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    number: int,
) -> None:
    """11 tensors of two models are 22 reads: the change comes at once, in the middle, after the last."""
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")
    change_at_read(monkeypatch, number, lambda: change(Path(models["b"])))
    with pytest.raises(
        FormatError, match=r"it changed under the merge|was changed while it was read"
    ) as caught:
        merge(recipe, output, threads=1, force=True)
    assert caught.value.path == Path(models["b"])
    assert sorted(os.listdir(tmp_path)) == ["models", "out.gguf"]
    assert output.read_bytes() == b"precious"


def test_a_disk_that_fails_under_an_input_is_named_and_can_be_cured(
    recipe: Recipe, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.gguf"

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        change_at_read(patch, 12, fail)
        with pytest.raises(
            FormatError, match=r"could not be read \(Input/output error\); see to"
        ) as caught:
            merge(recipe, output, threads=1)
    assert caught.value.path in map(Path, models.values())
    (note,) = caught.value.__notes__
    report = merge(recipe, output)
    assert report.resumed_tensors >= 5
    assert note == (
        "run the same command again to go on after the "
        f"{report.resumed_tensors} tensors that are finished, or delete {output}.part"
    )
