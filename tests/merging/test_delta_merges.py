"""Merges take deltas in place of experts; the base is read once; deltas add up and say what they are of."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.errors import VerificationError
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.model import GgufFile, GgufModel
from edgemerge.merging.delta import DeltaSettings, make_delta
from edgemerge.merging.run import merge, plan
from edgemerge.provenance.inputs import check_inputs
from edgemerge.provenance.verification import verify_model
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.types import UInt8
from tests.support.small_models import load_gguf, stored, wide_tensors, write_gguf

Float32 = NDArray[np.float32]
FORMS = (DeltaSettings(bits=2), DeltaSettings(density=0.2), DeltaSettings(rank=4))


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(make_app(), list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(*words: str | Path) -> str:
    result = CliRunner().invoke(make_app(), list(map(str, words)))
    assert result.exit_code in (1, 2)
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three experts, and a delta of each in another form."""
    folder = tmp_path_factory.mktemp("merges")
    base = wide_tensors(0)
    write_gguf(folder / "base.gguf", base)
    for i, asked in enumerate(FORMS):
        expert = write_gguf(folder / f"{i}.gguf", wide_tensors(i + 1, base))
        delta = folder / f"{i}.delta.gguf"
        make_delta(folder / "base.gguf", expert, delta, asked)
        # what the delta makes of the base, as a model
        recipe = make_recipe(
            "passthrough", [(f"{folder / 'base.gguf'}+{delta}", None)], out_type="F32"
        )
        merge(recipe, folder / f"{i}.made.gguf")
    return folder


def recipe_of(method: str, folder: Path, names: list[str], **more: Any) -> Any:
    models = [(str(folder / name), None) for name in names]
    return make_recipe(method, models, base=str(folder / "base.gguf"), out_type="F32", **more)


@pytest.mark.parametrize(
    "method",
    ["task_arithmetic", "ties", "dare_ties", "hierarchical", "tsv", "covariance", "linear"],
)
def test_a_delta_stands_for_its_expert(method: str, folder: Path, tmp_path: Path) -> None:
    for kind in ("delta", "made"):
        names = [f"0.{kind}.gguf", "1.gguf", f"2.{kind}.gguf"]
        merge(recipe_of(method, folder, names), tmp_path / f"{kind}.gguf")
    assert stored(tmp_path / "delta.gguf") == stored(tmp_path / "made.gguf")


@pytest.mark.parametrize("memory", [None, 72 << 20])
def test_the_base_is_read_once(
    memory: int | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Counter[str] = Counter()
    read_rows = GgufFile.read_rows

    def count(self: GgufFile, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        if self.path.name == "base.gguf":
            rows[name] += stop - start
        read_rows(self, name, start, stop, out_u8)

    names = [f"{i}.delta.gguf" for i in (0, 1, 2, 0, 1)]
    recipe = recipe_of("task_arithmetic", folder, names)
    monkeypatch.setattr(GgufFile, "read_rows", count)
    opened = Counter[str]()
    opening = GgufModel.__init__

    def note(self: GgufModel, path: Any) -> None:
        opened[Path(path).name] += 1
        opening(self, path)

    monkeypatch.setattr(GgufModel, "__init__", note)
    merge(recipe, tmp_path / "out.gguf", memory=memory)
    assert opened == {"base.gguf": 1}
    n_rows = {name: x.shape[0] if x.ndim > 1 else 1 for name, x in wide_tensors(0).items()}
    assert rows == {name: n + 1 for name, n in n_rows.items()}  # and a row for the checksum


def test_an_unchanged_tensor_is_not_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = wide_tensors(0)
    one = {**base, "blk.0.attn_q.weight": wide_tensors(1, base)["blk.0.attn_q.weight"]}
    expert = write_gguf(tmp_path / "one.gguf", one)
    delta = tmp_path / "one.delta.gguf"
    make_delta(folder / "base.gguf", expert, delta, DeltaSettings(bits=4))
    made = tmp_path / "made.gguf"
    text = f"{folder / 'base.gguf'}+{delta}"
    merge(make_recipe("passthrough", [(text, None)], out_type="F32"), made)
    rows = Counter[str]()
    read_rows = GgufFile.read_rows

    def count(self: GgufFile, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        rows[name] += (stop - start) * (self.path.name == "base.gguf")
        read_rows(self, name, start, stop, out_u8)

    monkeypatch.setattr(GgufFile, "read_rows", count)
    for path, out in ((delta, "a.gguf"), (made, "b.gguf")):
        merge(recipe_of("ties", folder, [str(path), "0.delta.gguf"]), tmp_path / out)
        if path is delta:
            found = dict(rows)
    assert stored(tmp_path / "a.gguf") == stored(tmp_path / "b.gguf")
    assert found["blk.0.ffn_down.weight"] == 64 + 1  # and a row for the checksum
    inputs = [
        folder / "base.gguf",
        Path(text),
        Path(f"{folder / 'base.gguf'}+{folder / '0.delta.gguf'}"),
    ]
    check_inputs(tmp_path / "a.gguf", inputs)


def test_memory_grows_by_what_a_delta_takes_alone(folder: Path) -> None:
    few, many = (
        plan(recipe_of("task_arithmetic", folder, ["0.delta.gguf"] * n), threads=1).needed_bytes
        for n in (2, 2)
    )
    assert few == many
    paths = []
    for i in range(40):
        paths.append(f"copy{i}.delta.gguf")
        (folder / paths[-1]).write_bytes((folder / "0.delta.gguf").read_bytes())
    much = plan(recipe_of("task_arithmetic", folder, paths), threads=1, memory=128 << 20)
    assert len(much.models) == 41
    assert much.needed_bytes <= 128 << 20


def test_deltas_in_a_recipe(folder: Path, tmp_path: Path) -> None:
    text = """
merge_method: task_arithmetic
base_model: base.gguf
models:
  - {model: 0.delta.gguf, parameters: {weight: 0.5}}
  - {model: base.gguf+2.delta.gguf, parameters: {weight: 0.5}}
edgemerge: {type: F32}
"""
    (folder / "recipe.yml").write_text(text)
    merge(load_recipe(folder / "recipe.yml"), tmp_path / "a.gguf")
    names = ["0.made.gguf", "2.made.gguf"]
    models = [(str(folder / name), 0.5) for name in names]
    recipe = make_recipe("task_arithmetic", models, base=str(folder / "base.gguf"), out_type="F32")
    merge(recipe, tmp_path / "b.gguf")
    assert stored(tmp_path / "a.gguf") == stored(tmp_path / "b.gguf")


def test_deltas_add_up(folder: Path, tmp_path: Path) -> None:
    base, path = folder / "base.gguf", tmp_path / "sum.delta.gguf"
    both = f"{base}+0.5*{folder / '0.delta.gguf'}+0.5*{folder / '1.delta.gguf'}"
    make_delta(base, both, path, DeltaSettings(bits=8))
    for text, out in ((f"{base}+{path}", "sum.gguf"), (both, "both.gguf")):
        merge(make_recipe("passthrough", [(text, None)], out_type="F32"), tmp_path / out)
    found, expected = load_gguf(tmp_path / "sum.gguf"), load_gguf(tmp_path / "both.gguf")
    before = load_gguf(base)
    for name, x in expected.items():
        change = np.abs(x - before[name]).max()
        assert np.abs(found[name] - x).max() <= change / 100


def test_a_delta_of_a_merge_says_how_that_was_made(folder: Path, tmp_path: Path) -> None:
    merged, path = tmp_path / "merged.gguf", tmp_path / "merged.delta.gguf"
    merge(recipe_of("ties", folder, ["0.delta.gguf", "1.gguf"]), merged)
    make_delta(folder / "base.gguf", merged, path, DeltaSettings(bits=4))
    said = run("verify", path)
    assert "delta: bits 4" in said
    assert "stage merged.gguf: ties" in said
    with closing(GgufFile(path)) as file:
        stages = json.loads(str(get_value(file.metadata, "edgemerge.stages")))
    assert stages[0]["inputs"] == ["base.gguf", "base.gguf+0.delta.gguf", "1.gguf"]


def test_a_delta_is_verified_with_its_inputs(folder: Path, tmp_path: Path) -> None:
    delta, inputs = folder / "0.delta.gguf", [folder / "base.gguf", folder / "0.gguf"]
    assert verify_model(delta).is_sound
    check_inputs(delta, inputs)
    other = tmp_path / "0.gguf"
    other.write_bytes((folder / "1.gguf").read_bytes())
    with pytest.raises(VerificationError, match="is not the input of that name"):
        check_inputs(delta, [inputs[0], other])
    with pytest.raises(VerificationError, match="is missing"):
        check_inputs(delta, inputs[:1])
    damaged = tmp_path / "damaged.gguf"
    content = bytearray(delta.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    assert not verify_model(damaged).is_sound


def test_a_merge_of_deltas_is_verified_with_its_inputs(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    merge(recipe_of("task_arithmetic", folder, ["0.delta.gguf", "1.gguf"]), output)
    base = folder / "base.gguf"
    check_inputs(output, [base, Path(f"{base}+{folder / '0.delta.gguf'}"), folder / "1.gguf"])


# -- the command -----------------------------------------------------------------------------------


def test_the_command_reports_bits_and_errors(folder: Path, tmp_path: Path) -> None:
    base, expert, path = folder / "base.gguf", folder / "0.gguf", tmp_path / "0.delta.gguf"
    said = run("delta", base, expert, "-o", path, "--keep", "0.9")
    assert "bits per weight" in said
    assert "% of the change is kept" in said
    report = json.loads(run("delta", base, expert, "-o", path, "--bits", "1", "--force", "--json"))
    assert report["setting"] == {"bits": 1}
    assert report["out_bytes"] == path.stat().st_size
    kinds = {kind["kind"]: kind for kind in report["kinds"]}
    assert kinds["attn_q"]["bits"] == 1.125
    assert 0.3 < kinds["attn_q"]["error"] < 1
    shown = run("inspect", path)
    assert "delta of base.gguf, llama, 11 changed tensors" in shown
    assert "layers ?" not in shown
    assert "lose" not in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bits", "7"], "--bits 7 must be one of 1, 2, 3, 4, 5, 6, 8"),
        (["--keep", "1"], "--keep must be above 0 and below 1"),
        (["--sparse", "0"], "--sparse must be above 0 and at most 1"),
        (["--bits", "1", "--keep", "0.5"], "exclude each other"),
        (["--size", "1000"], "did you mean"),
        (["--size", "4100"], "has no room"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], expected: str, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "delta.gguf"
    said = error_of("delta", folder / "base.gguf", folder / "0.gguf", "-o", output, *words)
    assert expected in " ".join(said.split())
    assert not list(tmp_path.iterdir())
