"""Directories as other tools leave them: file names, tensor names, and what inference does not use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgemerge.errors import FormatError
from edgemerge.formats.hub.model import HubModel
from tests.support.odd_directories import ARCHITECTURES, edit_json
from tests.support.safetensors_files import read_safetensors

Tensors = dict[str, np.ndarray]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small tied Llama, to be saved anew."""
    return shutil.copytree(ARCHITECTURES / "llama", tmp_path / "model")


@pytest.fixture
def tensors(folder: Path) -> Tensors:
    return {name: np.asarray(x, np.float16) for name, x in read_safetensors(folder / WHOLE).items()}


def read(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """All tensors as stored, and the notes."""
    model = HubModel(folder)
    found = {}
    for name, spec in model.specs().items():
        raw = np.empty(spec.nbytes, np.uint8)
        model.read_rows(name, 0, spec.n_rows, raw)
        found[name] = raw.tobytes()
    notes = list(model.notes())
    model.close()
    return found, notes


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_shards(folder: Path, tensors: Tensors, n: int, *, index: bool) -> None:
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(n):
        shard = f"model-{i + 1:05}-of-{n:05}.safetensors"
        part = {name: tensors[name] for name in names[i::n]}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    if index:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# Files


@pytest.mark.parametrize("n", [1, 3])
def test_shards_without_an_index_are_read(folder: Path, tensors: Tensors, n: int) -> None:
    save_file(tensors, folder / WHOLE)
    expected = read(folder)
    (folder / WHOLE).unlink()
    save_shards(folder, tensors, n, index=False)
    found, notes = read(folder)
    assert (found, notes) == (expected[0], [])


def test_shards_without_an_index_must_be_whole_and_of_one_set(
    folder: Path, tensors: Tensors
) -> None:
    (folder / WHOLE).unlink()
    save_shards(folder, tensors, 3, index=False)
    shutil.copy(
        folder / "model-00001-of-00003.safetensors", folder / "model-00001-of-00002.safetensors"
    )
    assert "has shards of 2 different sets" in refusal(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "shard 'model-00002-of-00003.safetensors' is missing" in refusal(folder)
    shutil.copy(
        folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    )
    assert "is in model-00001-of-00003.safetensors too" in refusal(folder)


@pytest.mark.parametrize(
    "stale", [True, False], ids=["its shards are gone", "its shards are there"]
)
def test_a_whole_file_counts_more_than_an_index(
    folder: Path, tensors: Tensors, stale: bool
) -> None:
    """As in transformers, which looks for the index where there is no model.safetensors."""
    save_file(tensors, folder / WHOLE)
    expected, _ = read(folder)
    older = {name: np.zeros_like(x) for name, x in tensors.items()}
    save_shards(folder, older, 2, index=True)
    if stale:
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()
    found, notes = read(folder)
    assert found == expected
    (note,) = notes
    others = INDEX if stale else "model-00001-of-00002.safetensors and 2 more"
    assert note == (
        f"model is read from model.safetensors, as transformers does, and not from {others}"
    )


def test_a_file_of_another_name_is_named(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "weights.safetensors")
    assert "rename weights.safetensors to model.safetensors" in refusal(folder)


# Names


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"pretrained_model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"language_model.{name}",
    ],
    ids=["without model.", "torch.compile", "DDP", "PEFT", "TRL", "both", "of a vision model"],
)
def test_names_that_a_tool_has_changed(
    folder: Path, tensors: Tensors, rename: Callable[[str], str]
) -> None:
    save_file(tensors, folder / WHOLE)
    expected, _ = read(folder)
    save_file({rename(name): x for name, x in tensors.items()}, folder / WHOLE)
    assert read(folder)[0] == expected


def test_the_model_without_its_head_is_the_tied_model(folder: Path, tensors: Tensors) -> None:
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, folder / WHOLE)
    edit_json(folder / "config.json", architectures=["LlamaModel"])
    assert "output.weight" not in read(folder)[0]


def test_one_tensor_under_two_names(folder: Path, tensors: Tensors) -> None:
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"].copy()}, folder / WHOLE)
    assert "'norm.weight': is model.norm.weight under another name" in refusal(folder)


# What inference does not use


@pytest.mark.parametrize(
    "unused",
    [
        {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
        {"model.rotary_emb.inv_freq": np.ones(4, np.float32)},
        {"model.embed_tokens.position_ids": np.arange(8)[None]},
        {"model.layers.0.self_attn.bias": np.ones((1, 1, 8, 8), bool)},
        {"model.layers.1.attention.masked_bias": np.array([-1e4], np.float32)},
        {"v_head.summary.weight": np.ones((1, 32), np.float32), "v_head.summary.bias": np.ones(1)},
        {"score.weight": np.ones((2, 32), np.float32)},
        {"model.some_counter": np.array([3])},
        {"model.layers.0.self_attn.k_scale": np.ones(1, np.float32)},
        {"mtp.fc.weight": np.ones((4, 4), np.float32)},
    ],
    ids=lambda unused: next(iter(unused)),
)
def test_unused_tensors_are_left_out_with_a_note(
    folder: Path, tensors: Tensors, unused: Tensors
) -> None:
    save_file(tensors, folder / WHOLE)
    expected, _ = read(folder)
    save_file(tensors | unused, folder / WHOLE)
    found, notes = read(folder)
    assert found == expected
    names = ", ".join(sorted(unused))
    assert notes == [f"model: tensors that the language model does not use are left out: {names}"]


def test_many_unused_tensors_make_one_note(folder: Path, tensors: Tensors) -> None:
    unused = {f"model.layers.{i}.rotary_emb.inv_freq": np.ones(4) for i in range(9)}
    save_file(tensors | unused, folder / WHOLE)
    (note,) = read(folder)[1]
    assert note.endswith("model.layers.2.rotary_emb.inv_freq and 6 more")


# Quantised, or said to be


@pytest.mark.parametrize(
    ("stated", "tool"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes",
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ],
)
def test_plain_weights_are_read_whatever_config_json_says(
    folder: Path, stated: dict, tool: str
) -> None:
    edit_json(folder / "config.json", **stated)
    assert read(folder)[1] == [
        f"model: config.json says that the weights are quantised by '{tool}', but they are plain, and "
        "read as such"
    ]


QUERY = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("packed", "stated", "says"),
    [
        (
            {"weight": np.zeros((512, 1), np.uint8), "weight.absmax": np.zeros(8, np.float32)},
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantised by 'bitsandbytes', which is not read from here; give the original fp16",
        ),
        (
            {"qweight": np.zeros((4, 32), np.int32), "g_idx": np.zeros(32, np.int32)},
            {"quantization_config": {"quant_method": "gptq"}},
            "quantised by 'gptq'",
        ),
        (
            {"qweight": np.zeros((4, 32), np.int32)},
            {},
            "quantised by 'some tool'",
        ),
        (
            {
                "weight": np.zeros((32, 4), np.uint32),
                "scales": np.zeros((32, 1), np.float16),
                "biases": np.zeros((32, 1), np.float16),
            },
            {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}},
            "quantised by 'mlx', which is not read from here; unpack it with mlx_lm.convert --deq",
        ),
        (
            {"weight_packed": np.zeros((32, 4), np.int32), "weight_scale": np.zeros(4, np.float16)},
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantised by 'compressed-tensors'",
        ),
    ],
    ids=["bitsandbytes", "gptq", "unsaid", "mlx", "compressed-tensors"],
)
def test_packed_weights_are_refused_by_their_tool(
    folder: Path, tensors: Tensors, packed: Tensors, stated: dict, says: str
) -> None:
    del tensors[QUERY + "weight"]
    save_file(tensors | {QUERY + name: x for name, x in packed.items()}, folder / WHOLE)
    edit_json(folder / "config.json", **stated)
    assert says in refusal(folder)


def test_a_lora_that_was_not_merged_is_named(folder: Path, tensors: Tensors) -> None:
    lora = {f"base_model.model.{QUERY}lora_A.default.weight": np.zeros((4, 32), np.float16)}
    save_file(tensors | lora, folder / WHOLE)
    assert "belongs to a LoRA; merge it into its base model first" in refusal(folder)


# Models of other tools, saved as their tools save them


@pytest.mark.parametrize(
    "changes",
    [
        {"unsloth_version": "2026.11.3", "unsloth_fixed": True, "pad_token_id": 331},
        {"_name_or_path": "out", "torch_dtype": "bfloat16", "use_cache": False},
        {"auto_map": {"AutoModelForCausalLM": "modeling.MyLlama"}},
        {"hidden_act": "swish"},
    ],
    ids=["unsloth", "axolotl", "auto_map", "swish"],
)
def test_keys_that_tools_leave_in_config_json(folder: Path, changes: dict) -> None:
    edit_json(folder / "config.json", **changes)
    assert read(folder)[1] == []


def test_plain_weights_that_mlx_saved_are_read(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / WHOLE)
    expected, _ = read(folder)
    save_file(tensors, folder / WHOLE, metadata={"format": "mlx"})
    assert read(folder) == (expected, [])


def test_a_classifier_is_refused_with_a_remedy(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    assert "give the language model that it was made from" in refusal(folder)
