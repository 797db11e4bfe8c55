"""Directories out: the same tensors after a way through GGUF and back, for every family that is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import FormatError, OutputError, RecipeError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.hub.files import FOLDER_FILES
from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.hub.safetensors import read_header, read_metadata
from edgemerge.merging.run import merge, plan
from edgemerge.planning.compatibility import read_tensor
from edgemerge.planning.folder import find_ends
from edgemerge.recipe.recipe import load_recipe, make_recipe
from tests.support.adapters import KINDS, write_adapter
from tests.support.architecture_models import ARCHITECTURES, CASES, copy_model, facts
from tests.support.directories import made_digest, read_stored
from tests.support.generated_models import GENERATED_CASES
from tests.support.places import ROOT, TESTS

CHECKED: dict[str, str] = json.loads((TESTS / "data" / "made_configs.json").read_text())
LLAMA = ARCHITECTURES / "llama"
# Which may come or go: llama.cpp takes no notice, or the default is the same.
OTHERWISE = ("add_space_prefix", "add_sep_token", "yarn_attn_factor")


def write_folder(model: Path, target: Path, **options: Any) -> Path:
    split = options.pop("split_bytes", None)
    force = options.pop("force", False)
    recipe = make_recipe("passthrough", [(str(model), None)], out_format="hf", **options)
    merge(recipe, target, threads=1, split_bytes=split, force=force)
    return target


def write_gguf(model: Path, target: Path) -> Path:
    merge(make_recipe("passthrough", [(str(model), None)], out_type="F32"), target, threads=1)
    return target


@pytest.mark.parametrize(("name", "variant"), CASES, ids=["-".join(c) for c in CASES])
def test_the_way_through_gguf_and_back_changes_no_tensor(
    name: str, variant: str, tmp_path: Path
) -> None:
    model = copy_model(name, facts(name)["converter"][variant]["config"], tmp_path)
    given = read_stored(model)
    dtype = next(iter(given.values()))[0]
    source = write_gguf(model, tmp_path / "model.gguf")
    back = write_folder(source, tmp_path / "back", out_type=dtype)
    assert read_stored(back) == given
    assert made_digest(back) == CHECKED[f"{name}-{variant}"]
    before, after = GgufModel(source), HubModel(back)
    metadata = {
        key: value
        for key, value in after.metadata().items()
        if not key.startswith(("general.", "edgemerge.")) and not key.endswith(OTHERWISE)
    }
    # llama.cpp's converter counts the control token <unk> of Phi-3 as one more special token.
    lost = ("scores", "token_type") if name == "phi3" else ()
    for key, value in metadata.items():
        if not key.endswith(lost):
            assert value == before.metadata()[key], key
    after.close()
    before.close()


def test_every_family_was_checked_with_transformers() -> None:
    """`python -m tools.check_directories` does it: directories made of GGUF files have its logits."""
    assert set(CHECKED) == {"-".join(case) for case in (*CASES, *GENERATED_CASES)}


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_from_a_directory_names_tensors_and_tokenizer_stay(name: str, tmp_path: Path) -> None:
    given = ARCHITECTURES / name
    made = write_folder(given, tmp_path / "made")
    assert read_stored(made) == read_stored(given)
    for path in given.iterdir():
        if path.name in FOLDER_FILES and path.name.startswith(("tokenizer", "special", "gen")):
            assert (made / path.name).read_bytes() == path.read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (given, made))
    assert new["architectures"] == old["architectures"]
    assert {key: new[key] for key in old if key in new} == {
        key: old[key] for key in old if key in new
    }
    assert read_metadata(made / "model.safetensors")["format"] == "pt"


def test_shards_have_an_index_and_together_all_tensors(tmp_path: Path) -> None:
    whole = write_folder(LLAMA, tmp_path / "whole")
    cut = write_folder(LLAMA, tmp_path / "cut", split_bytes=12_000)
    assert read_stored(cut) == read_stored(whole)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    shards = sorted(cut.glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 3
    found = {name: shard.name for shard in shards for name in read_header(shard)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(len(raw) for *_, raw in read_stored(cut).values())


@pytest.mark.parametrize("out_type", ["F32", "F16", "BF16"])
def test_bytes_do_not_depend_on_threads_and_budget(out_type: str, tmp_path: Path) -> None:
    folders = []
    for i, (threads, memory) in enumerate([(1, None), (2, 68 << 20)]):
        recipe = make_recipe(
            "linear",
            [(str(ARCHITECTURES / "gemma2"), 0.3), (str(ARCHITECTURES / "gemma2"), 0.7)],
            out_type=out_type,
            out_format="hf",
            memory=memory,
        )
        merge(recipe, tmp_path / f"{i}", threads=threads)
        folders.append({p.name: p.read_bytes() for p in (tmp_path / f"{i}").iterdir()})
    assert folders[0] == folders[1]
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[out_type]
    assert json.loads(folders[0]["config.json"])["dtype"] == dtype


def test_a_merge_of_directories_is_the_one_of_their_ggufs(tmp_path: Path) -> None:
    """The values of F32 outputs; random pruning depends on rows being in GGUF's order."""
    other = copy_model("llama", {}, tmp_path)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-3001:-1000:2] = weights[-5001:-3000:2]  # high bytes of bf16: other numbers
    (other / "model.safetensors").write_bytes(weights)
    given: dict[str, Any] = {"base": str(LLAMA), "parameters": {"density": 0.5}}
    recipe = make_recipe("dare_linear", [(str(other), 1.0)], out_type="F32", **given)
    merge(recipe, tmp_path / "merged.gguf", threads=1)
    recipe = make_recipe(
        "dare_linear", [(str(other), 1.0)], out_type="F32", out_format="hf", **given
    )
    merge(recipe, tmp_path / "merged", threads=1)
    write_gguf(tmp_path / "merged", tmp_path / "again.gguf")
    left, right = (GgufModel(tmp_path / f"{name}.gguf") for name in ("merged", "again"))
    assert list(left.specs()) == list(right.specs())
    for name in left.specs():
        assert read_tensor(left, name) == read_tensor(right, name), name
    left.close()
    right.close()


def test_layers_may_be_stacked(tmp_path: Path) -> None:
    text = f"""
merge_method: passthrough
slices:
- sources: [{{model: {LLAMA}, layer_range: [0, 2]}}]
- sources: [{{model: {LLAMA}, layer_range: [1, 2]}}]
edgemerge: {{format: hf}}
"""
    (tmp_path / "recipe.yml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yml")
    merge(recipe, tmp_path / "tall", threads=1)
    model = HubModel(tmp_path / "tall")
    assert model.config.n_layers == 3
    stored = read_stored(tmp_path / "tall")
    assert (
        stored["model.layers.2.mlp.up_proj.weight"] == stored["model.layers.1.mlp.up_proj.weight"]
    )
    model.close()


def test_stages_end_in_a_directory(tmp_path: Path) -> None:
    text = f"""
name: first
merge_method: linear
models:
- {{model: {LLAMA}, parameters: {{weight: 1}}}}
- {{model: {LLAMA}, parameters: {{weight: 3}}}}
---
merge_method: passthrough
models: [{{model: first}}]
edgemerge: {{format: hf, type: BF16}}
"""
    (tmp_path / "recipe.yml").write_text(text)
    merge(load_recipe(tmp_path / "recipe.yml"), tmp_path / "out", threads=1)
    assert read_stored(tmp_path / "out") == read_stored(LLAMA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yml"]
    assert "stage first: linear" in (tmp_path / "out" / "README.md").read_text()
    model = HubModel(tmp_path / "out")
    assert "edgemerge.stages" in model.metadata()
    model.close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"out_type": "Q4_K_M"}, "is written as F32, F16, BF16, not Q4_K_M"),
        ({"tensor_types": [("attn_v", "Q8_0")]}, "leave out --tensor-type"),
        ({"out_format": "onnx"}, "choose one of gguf, hf"),
    ],
)
def test_what_a_directory_cannot_have_is_refused(options: dict[str, Any], sentence: str) -> None:
    given = {"out_format": "hf", **options}
    with pytest.raises(RecipeError, match=sentence):
        plan(make_recipe("passthrough", [(str(LLAMA), None)], **given))


def change_gguf(path: Path, changes: Mapping[str, bytes | None]) -> Path:
    """Write a GGUF again with other metadata; None takes a key out."""
    model = GgufModel(path)
    changed = {**model.metadata(), **changes}
    metadata = {key: value for key, value in changed.items() if value is not None}
    specs = list(model.specs().values())
    start = min(make_layout(model.metadata(), specs).offsets.values())
    target = path.with_name("changed.gguf")
    target.write_bytes(make_layout(metadata, specs).header + path.read_bytes()[start:])
    model.close()
    return target


ARCH, TOKENS = "llama.", "tokenizer.ggml."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {f"{ARCH}attention.sliding_window": encode_value(8, "u32")},
            "as llama, it has attention.sliding_window 8",
        ),
        (
            {f"{ARCH}rope.dimension_count": encode_value(4, "u32")},
            "as llama, it has rope.dimension_count 4",
        ),
        ({f"{ARCH}expert_count": encode_value(4, "u32")}, "as mixtral"),
        ({f"{TOKENS}pre": encode_value("bloom", "str")}, "cuts text in the way 'bloom'"),
        ({f"{TOKENS}model": encode_value("t5", "str")}, "is of the kind 't5'"),
        ({f"{TOKENS}merges": None}, "has no merges"),
    ],
)
def test_a_gguf_that_says_what_no_directory_can_is_refused_by_name(
    changes: dict[str, bytes | None], sentence: str, tmp_path: Path
) -> None:
    source = change_gguf(write_gguf(LLAMA, tmp_path / "model.gguf"), changes)
    with pytest.raises(FormatError, match=sentence) as caught:
        plan(make_recipe("passthrough", [(str(source), None)], out_format="hf"))
    assert caught.value.path == source
    assert "write a GGUF" in str(caught.value)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    source = write_gguf(LLAMA, tmp_path / "model.gguf")
    changes = {
        "general.architecture": encode_value("falcon", "str"),
        "falcon.block_count": encode_value(2, "u32"),
    }
    other = change_gguf(source, changes)
    with pytest.raises(FormatError, match="of the architecture 'falcon', of which no directory"):
        plan(make_recipe("passthrough", [(str(other), None)], out_format="hf"))


@pytest.mark.parametrize("kind", ["new", "force"])
def test_a_directory_that_dies_goes_on(kind: str, memory_folder: Path) -> None:
    folder = memory_folder / kind
    folder.mkdir()
    command = [sys.executable, "-m", "tests.support.dying_folders", str(LLAMA), str(folder), kind]
    done = subprocess.run([*command, "17"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["bad"] == []
    assert found["calls"] > 100
    assert found["journals"] > 5


def test_only_a_folder_of_ours_is_replaced(tmp_path: Path) -> None:
    made = write_folder(LLAMA, tmp_path / "made")
    with pytest.raises(OutputError, match="exists already"):
        write_folder(LLAMA, made)
    write_folder(LLAMA, made, force=True, out_type="F32")
    assert read_stored(made)["model.norm.weight"][0] == "F32"
    (made / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not replaced, as it has 'notes.txt'"):
        write_folder(LLAMA, made, force=True)
    theirs = copy_model("llama", {}, tmp_path)
    (theirs / "expected.json").unlink()
    (theirs / "logits.npz").unlink()
    with pytest.raises(OutputError, match="no edgemerge made its weights"):
        write_folder(ARCHITECTURES / "qwen2", theirs, force=True)
    assert (theirs / "model.safetensors").is_file()
    (tmp_path / "empty").mkdir()
    write_folder(LLAMA, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "llama", "made"]
    made_again = tmp_path / "empty"
    with pytest.raises(OutputError, match="is one of the inputs, or in it"):
        write_folder(theirs, theirs / "inside", force=True)
    adapter = write_adapter(KINDS["lora"], tmp_path / "adapter")
    with pytest.raises(OutputError, match="is one of the inputs, or in it"):
        write_folder(Path(f"{made_again}+{adapter}"), made_again, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no folder"):
        write_folder(LLAMA, tmp_path / "file", force=True)


@pytest.mark.parametrize(
    ("tokens", "stated", "eos"),
    [
        (["</s>", "<end_of_turn>"], None, [0, 1]),  # Gemma 2 and 3
        (["<|endoftext|>", "<|end|>"], None, [0, 1]),  # Phi-3
        (["<|return|>", "<|end|>"], None, 0),  # gpt-oss: <|end|> ends a message
        (["</s>", "x"], 1, [0, 1]),
        (["</s>", "x"], None, 0),
    ],
)
def test_generation_stops_at_the_end_of_a_turn(
    tokens: list[str], stated: int | None, eos: int | list[int]
) -> None:
    metadata = {
        "tokenizer.ggml.tokens": encode_value(tokens, "[str]"),
        "tokenizer.ggml.eos_token_id": encode_value(0, "u32"),
    }
    if stated is not None:
        metadata["tokenizer.ggml.eot_token_id"] = encode_value(stated, "u32")
    assert find_ends(metadata)["eos_token_id"] == eos
