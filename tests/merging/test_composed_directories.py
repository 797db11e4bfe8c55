"""Directories out of hybrids and mixtures: what is cut, moved, transposed or computed is made undone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from edgemerge.errors import MismatchError
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.hub import layouts
from edgemerge.formats.hub.changes import as_f32
from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.hub.placement import find_places, list_units, make_shards
from edgemerge.formats.quants.codec import find_codec
from edgemerge.merging.run import merge
from edgemerge.output.file import OutputFile
from edgemerge.output.places import TensorPlace
from edgemerge.provenance.verification import verify_model
from edgemerge.recipe.recipe import make_recipe
from tests.support.architecture_models import convert
from tests.support.directories import Stored, made_digest, read_stored
from tests.support.generated_models import (
    GENERATED_CASES,
    all_facts,
    draw,
    make_model,
    write_tensors,
)
from tests.support.places import ROOT, TESTS
from tests.support.safetensors_files import read_safetensors

CHECKED: dict[str, str] = json.loads((TESTS / "data" / "made_configs.json").read_text())
NAMES = sorted({name for name, _ in GENERATED_CASES})
PACKED = ("gpt_oss",)  # has experts in MXFP4, which are written as plain ones
# A GGUF of Falcon-H1 has the factors in its weights. A head with others than the embedding is stored.
FACTORED = ("falcon_h1", "falcon_h1_norm")
EXTRA = {"falcon_h1_norm": {"lm_head.weight"}}
# Which may come or go: llama.cpp takes no notice, or the default is the same.
OTHERWISE = ("add_space_prefix", "add_sep_token")
CONTEXT = "context_length"  # of a model that rotates nothing


def write_folder(model: Path, target: Path, **options: Any) -> Path:
    recipe = make_recipe("passthrough", [(str(model), None)], out_format="hf", **options)
    merge(recipe, target, threads=1)
    return target


def make_case(name: str, variant: str, folder: Path) -> Path:
    return make_model(name, folder / name, **all_facts()[name]["variants"][variant]["config"])


def values_of(stored: Stored) -> dict[str, NDArray[np.float32]]:
    """Return the values of a directory's tensors by their stored names."""
    return {
        name: as_f32(np.frombuffer(raw, np.uint8), dtype).reshape(shape)
        for name, (dtype, shape, raw) in stored.items()
    }


def read_values(path: Path) -> dict[str, NDArray[np.float32]]:
    """Return the values of a GGUF's tensors."""
    model, found = GgufModel(path), {}
    for name, spec in model.specs().items():
        raw_u8 = np.empty(spec.nbytes, np.uint8)
        model.read_rows(name, 0, spec.n_rows, raw_u8)
        found[name] = np.empty(spec.n_elements, np.float32)
        find_codec(spec).decode(raw_u8, found[name])
    model.close()
    return found


def assert_alike(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Compare values: those that are computed there and back may differ in the last places."""
    assert left.keys() == right.keys()
    for name, values in left.items():
        is_exact = not name.endswith(("ssm_a", "A_log", "norm.weight"))
        most = 0 if is_exact else 2e-7
        np.testing.assert_allclose(values, right[name], rtol=most, atol=most, err_msg=name)


@pytest.mark.parametrize(("name", "variant"), GENERATED_CASES, ids=map("-".join, GENERATED_CASES))
def test_the_way_through_gguf_and_back_changes_no_tensor(
    name: str, variant: str, tmp_path: Path
) -> None:
    model = make_case(name, variant, tmp_path)
    source = convert(model, tmp_path / "model.gguf")
    back = write_folder(source, tmp_path / "back", out_type="F32")
    assert made_digest(back) == CHECKED[f"{name}-{variant}"]
    given, found = read_stored(model), values_of(read_stored(back))
    if name not in (*PACKED, *FACTORED):
        assert_alike(values_of(given), found)
        narrow = write_folder(source, tmp_path / "narrow", out_type="BF16")
        assert read_stored(narrow) == given
    again = convert(back, tmp_path / "again.gguf")
    assert_alike(read_values(source), read_values(again))
    before, after = GgufModel(source), GgufModel(again)
    for key, value in after.metadata().items():
        is_compared = not key.startswith(("general.", "edgemerge."))
        if is_compared and not key.endswith(OTHERWISE):
            assert value == before.metadata()[key], key
    before.close()
    after.close()


@pytest.mark.parametrize("name", NAMES)
def test_from_a_directory_names_and_tensors_stay(name: str, tmp_path: Path) -> None:
    given = make_model(name, tmp_path / name)
    made = write_folder(given, tmp_path / "made", out_type="BF16")
    old, new = read_stored(given), read_stored(made)
    if name in PACKED:
        assert {key: new[key] for key in old if key in new} == {
            key: old[key] for key in old if key in new
        }
    else:
        assert {key: new[key] for key in new if key not in EXTRA.get(name, ())} == old
    verify_model(made).check()


def test_packed_experts_are_written_as_plain_ones_in_bf16(tmp_path: Path) -> None:
    given = make_model("gpt_oss", tmp_path / "given")
    made = write_folder(given, tmp_path / "made")
    assert {dtype for dtype, *_ in read_stored(made).values()} == {"BF16"}
    assert read_stored(made).keys() == all_facts()["gpt_oss_plain"]["stored"].keys()
    assert "quantization_config" not in json.loads((made / "config.json").read_text())
    left, right = (
        read_values(convert(folder, tmp_path / f"{folder.name}.gguf")) for folder in (given, made)
    )
    assert list(left) != list(right)  # the converter lists packed experts first
    for key, values in left.items():
        np.testing.assert_array_equal(values, right[key], err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_is_the_one_of_the_ggufs(name: str, tmp_path: Path) -> None:
    folders = [str(make_model(name, tmp_path / str(seed), seed=seed)) for seed in range(3)]
    experts = [(folder, 0.5) for folder in folders[1:]]
    given: dict[str, Any] = {"base": folders[0], "out_type": "F32"}
    merge(make_recipe("task_arithmetic", experts, **given), tmp_path / "merged.gguf", threads=1)
    for i, (threads, memory) in enumerate([(1, None), (2, 68 << 20)]):
        recipe = make_recipe("task_arithmetic", experts, out_format="hf", memory=memory, **given)
        merge(recipe, tmp_path / f"merged-{i}", threads=threads, split_bytes=60_000)
    assert read_stored(tmp_path / "merged-0") == read_stored(tmp_path / "merged-1")
    again = convert(tmp_path / "merged-0", tmp_path / "again.gguf")
    left, right = read_values(tmp_path / "merged.gguf"), read_values(again)
    if name in PACKED:
        left, right = (dict(sorted(values.items())) for values in (left, right))
    for key, values in left.items():
        np.testing.assert_allclose(values, right[key], rtol=1e-6, atol=2e-7, err_msg=key)
    verify_model(tmp_path / "merged-0").check()


@pytest.mark.parametrize("piece", [None, 100], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_may_be_written_in_any_order(
    name: str, piece: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row alone, the last first, all tensors in turn: then the file is as it was."""
    folder = write_folder(make_model(name, tmp_path / name), tmp_path / "made", out_type="BF16")
    model, path = HubModel(folder), tmp_path / "new.safetensors"
    specs = list(model.stored_specs().values())
    (shard,) = make_shards(list_units(model.config, specs), 1 << 40, {}).values()
    places = find_places(model.config, {path: shard})
    rows: dict[str, list[Any]] = {}
    for spec in specs:
        raw_u8 = np.empty(spec.nbytes, np.uint8)
        model.read_stored(spec.name, 0, spec.n_rows, raw_u8)
        rows[spec.name] = list(raw_u8.reshape(spec.n_rows, -1))
    model.close()
    if piece is not None:
        monkeypatch.setattr(layouts, "PIECE", piece)
        monkeypatch.setattr(layouts, "SKIPPED", 0)
    with OutputFile(path, shard.layout.n_bytes) as file:
        file.reserve()
        span = (len(shard.layout.header), shard.layout.n_bytes)
        written = {}
        for spec in specs:
            layout = places[spec.name].layout
            assert not isinstance(layout, layouts.Packed)
            written[spec.name] = TensorPlace(file, spec, layout, span)
        for row in reversed(range(max(spec.n_rows for spec in specs))):
            for spec in specs:
                if row < spec.n_rows:
                    written[spec.name].write_rows(row, rows[spec.name][row].copy())
        for spec in specs:
            assert written[spec.name].crc32() == crc32(b"".join(map(bytes, rows[spec.name])))
        file.write(shard.layout.header, 0)
        file.publish()
    left, right = read_safetensors(path), read_safetensors(folder / "model.safetensors")
    assert left.keys() == right.keys()
    for key, values in left.items():
        np.testing.assert_array_equal(values, right[key], err_msg=key)


def test_workers_do_not_write_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns of gates and of their neighbours come in turn, and are written by two workers."""
    read_items = OutputFile.read_items

    def read_and_wait(self: OutputFile, items: list[memoryview], offset: int) -> None:
        read_items(self, items, offset)
        time.sleep(0.0005)

    folder = make_model("gpt_oss_plain", tmp_path / "model")
    monkeypatch.setattr(OutputFile, "read_items", read_and_wait)
    recipe = make_recipe("passthrough", [(str(folder), None)], out_format="hf")
    merge(recipe, tmp_path / "made", threads=4)
    assert read_stored(tmp_path / "made") == read_stored(folder)


@pytest.mark.parametrize(("name", "step"), [("gpt_oss_plain", 97), ("qwen3_5", 23)])
def test_a_directory_that_dies_goes_on(name: str, step: int, memory_folder: Path) -> None:
    model, folder = make_model(name, memory_folder / "model"), memory_folder / "new"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.support.dying_folders", str(model), str(folder)]
    done = subprocess.run(
        [*command, "new", str(step)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["bad"] == []
    assert found["journals"] > 5


def test_what_does_not_decay_is_refused(tmp_path: Path) -> None:
    """A decay times -1 grows, and has no logarithm."""
    folder = make_model("granite4_hybrid", tmp_path / "model")
    recipe = make_recipe(
        "linear", [(str(folder), -1.0)], out_format="hf", parameters={"normalize": False}
    )
    with pytest.raises(
        MismatchError, match=r"'blk.0.ssm_a' has values that a directory cannot have"
    ):
        merge(recipe, tmp_path / "made", threads=1)
    assert not (tmp_path / "made").exists()


def test_rows_that_a_directory_lacks_are_not_lost(tmp_path: Path) -> None:
    """Gemma 3n's embeddings of layers have fewer rows than tokens; GGUF's others are 0."""
    folder = make_model("gemma3n", tmp_path / "model")
    other = make_model("gemma3n", tmp_path / "other", vocab_size_per_layer_input=384)
    stored = all_facts()["gemma3n"]["stored"]
    name = "model.embed_tokens_per_layer.weight"
    shapes = {**stored, name: [384, *stored[name][1:]]}
    write_tensors(
        other / "model.safetensors", {key: draw(key, shape, 0) for key, shape in shapes.items()}
    )
    source = convert(other, tmp_path / "other.gguf")
    recipe = make_recipe("linear", [(str(folder), 0.5), (str(source), 0.5)], out_format="hf")
    with pytest.raises(MismatchError, match="has values in rows that its directory does not have"):
        merge(recipe, tmp_path / "made", threads=1)
