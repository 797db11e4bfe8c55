"""An adapter is written where nothing is lost, and only of numbers that it can hold."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import EdgemergeError, FormatError, MismatchError, OutputError, RecipeError
from edgemerge.formats.adapters.config import ADAPTER_CONFIG
from edgemerge.formats.adapters.peft import WEIGHTS
from edgemerge.merging.adapter_parts import Spool
from edgemerge.merging.combination import combine
from edgemerge.merging.delta import DeltaSettings, make_delta
from edgemerge.merging.extraction import extract
from edgemerge.output.file import OutputFile
from tests.support.adapters import COMBINED, KINDS, write_adapter
from tests.support.architecture_models import ARCHITECTURES

BASE = ARCHITECTURES / "llama"


def adapters(folder: Path) -> list[tuple[Path, float]]:
    return [(write_adapter(KINDS[name], folder / name), 1.0) for name in COMBINED]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_no_input_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    both = [(Path(path.name), weight) for path, weight in adapters(tmp_path)]
    shutil.copytree(BASE, "base")
    first, expert = both[0][0], f"base+{both[0][0]}"
    before = {folder: files(folder) for folder in (first, Path("base"))}
    with pytest.raises(OutputError, match="is one of the inputs; choose another name"):
        combine(both, first, force=True)
    for output in ("base", first):
        with pytest.raises(OutputError, match="is one of the inputs; choose another name"):
            extract("base", expert, output, force=True)
    with pytest.raises(OutputError, match="belongs to one of the inputs"):
        make_delta("base", expert, "base/model.safetensors", DeltaSettings(bits=1), force=True)
    assert before == {folder: files(folder) for folder in before}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("delta", "out.gguf"),
        ("extract", "out.gguf"),
        ("extract", "out/adapter_model.safetensors"),
        ("combine", "out/adapter_config.json"),
    ],
)
def test_a_file_that_comes_during_the_work_stays(command: str, name: str, tmp_path: Path) -> None:
    """Fault: it was replaced without --force."""
    both, theirs = adapters(tmp_path), tmp_path / name
    output, expert = tmp_path / Path(name).parts[0], f"{BASE}+{both[0][0]}"
    run: dict[str, Any] = {
        "delta": partial(make_delta, BASE, expert, output, DeltaSettings(bits=8)),
        "extract": partial(extract, BASE, expert, output),
        "combine": partial(combine, both, output),
    }

    def come(_done: int, _total: int) -> None:
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_bytes(b"precious")

    with pytest.raises(OutputError, match="exists already; choose another name or give --force"):
        run[command](progress=come)
    assert theirs.read_bytes() == b"precious"
    assert not list(tmp_path.rglob("*.part"))


def test_no_combination_is_made_of_an_adapter_that_changes(tmp_path: Path) -> None:
    """Fault: nobody looked, and half of one and half of another was written."""
    both = adapters(tmp_path)
    with pytest.raises(FormatError, match="was changed while it was read") as caught:
        combine(
            both, tmp_path / "out", progress=lambda _done, _total: os.utime(both[1][0] / WEIGHTS)
        )
    assert caught.value.path == both[1][0] / WEIGHTS
    assert not (tmp_path / "out").exists()


def test_no_adapter_is_put_beside_a_model_s_weights(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    for force in (False, True):
        with pytest.raises(OutputError, match="is the folder of a model"):
            combine(adapters(tmp_path / f"{force}"), tmp_path / "model", force=force)
    assert files(tmp_path / "model") == files(BASE)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_no_weights_stand_beside_the_ranks_of_another_adapter(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "out"
    combine(adapters(tmp_path), made)
    before, whole = files(made), getattr(OutputFile, step)

    def fail(file: OutputFile, *given: Any) -> None:
        if file.path.name == ADAPTER_CONFIG:
            raise OutputError("the disk is full", path=file.path)
        whole(file, *given)

    monkeypatch.setattr(OutputFile, step, fail)
    with pytest.raises(OutputError, match="the disk is full"):
        combine([(tmp_path / name, 0.5) for name in COMBINED], made, force=True)
    if step == "write":
        assert files(made) == before
    else:
        assert list(files(made)) == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("weight", "dtype", "kind", "words"),
    [
        (float("nan"), "F32", RecipeError, "the weight of .* is nan; give a finite number"),
        (float("inf"), "F32", RecipeError, "the weight of .* is inf; give a finite number"),
        (1e300, "F32", MismatchError, "reaches numbers that F32 cannot hold; give smaller weights"),
        (1e30, "F16", MismatchError, "that F16 cannot hold; give --type F32, or smaller weights"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_adapter_has_numbers_alone(
    weight: float, dtype: str, kind: type[EdgemergeError], words: str, tmp_path: Path
) -> None:
    uses = [(path, weight) for path, _ in adapters(tmp_path)]
    with pytest.raises(kind, match=words):
        combine(uses, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 4}, "cat has no rank to choose; leave out --rank"),
        ({"rank": 4, "how": "ties", "density": 0.5}, "ties has no rank to choose"),
        ({"density": 0.5}, "cat keeps all elements; leave out --density"),
        ({"density": 0.5, "how": "svd"}, "svd keeps all elements"),
        ({"by_count": True}, "cat elects no signs; leave out --by-count"),
        ({"density": 53, "how": "ties"}, "the density is 53; give a number from 0 to 1"),
    ],
)
def test_a_setting_without_effect_is_refused(
    settings: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        combine(adapters(tmp_path), tmp_path / "out", **settings)  # type: ignore[arg-type]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    adapters(tmp_path)
    name = next(iter(COMBINED))
    with pytest.raises(FormatError, match=f"there is no such folder; did you mean .*{name}"):
        combine([(tmp_path / f"{name}x", 1.0)], tmp_path / "out")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as file:
        spool = Spool(file, tmp_path / "out")
        with pytest.raises(
            OutputError, match=r"out: the disk cannot keep .*No space left on device"
        ):
            spool.add(np.zeros(9, np.float32))
    with tempfile.TemporaryFile() as file:
        spool = Spool(file, tmp_path / "out")
        assert spool.read(spool.add(np.ones(3, np.float32)), (3,)).tolist() == [1, 1, 1]
