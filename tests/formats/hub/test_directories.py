"""Hugging Face directories that are incomplete, unusual or of another kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgemerge.errors import FormatError
from edgemerge.formats.architectures import hf_name
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.hub.files import is_hub_dir
from edgemerge.formats.hub.model import HubModel
from tests.support.places import TESTS

HUB = TESTS / "data" / "hub"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of a small model, to be spoilt."""
    return shutil.copytree(HUB / "llama3", tmp_path / "model")


def refusal(directory: Path) -> str:
    with pytest.raises(FormatError) as caught:
        HubModel(directory).metadata()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


# Directories


def test_is_hub_dir(tmp_path: Path) -> None:
    assert is_hub_dir(HUB / "llama3")
    assert not is_hub_dir(tmp_path)
    assert not is_hub_dir(HUB / "llama3" / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert is_hub_dir(tmp_path)


def test_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in refusal(tmp_path)


def test_missing_pieces(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "pickle" in refusal(directory)
    (directory / "pytorch_model.bin").rename(directory / "model-00001-of-00002.safetensors")
    assert "shard 'model-00002-of-00002.safetensors' is missing" in refusal(directory)
    (directory / "model-00001-of-00002.safetensors").unlink()
    assert "neither" in refusal(directory)
    (directory / "config.json").unlink()
    assert "is no model folder: it has no config.json" in refusal(directory)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return shutil.copytree(HUB / "qwen_bias_sharded", tmp_path / "sharded")


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    assert f"shard '{SHARD}' is missing" in refusal(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        7,
        "x.bin",
        "a\0.safetensors",
        "a\n.safetensors",
        "\ud800.safetensors",
        "x" * 255 + ".safetensors",
    ],
)
def test_shard_names_stay_in_the_directory(sharded: Path, shard: object) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=weight_map | {"lm_head.weight": shard})
    assert "not a plain *.safetensors file name" in refusal(sharded)


def test_index_and_shards_agree(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map=weight_map | {"model.extra": SHARD})
    assert "lists it in this shard, which does not hold it" in refusal(sharded)
    less = {k: v for k, v in weight_map.items() if k != "model.norm.weight"}
    edit(sharded / INDEX, weight_map=less)
    assert "'model.norm.weight': is in this shard" in refusal(sharded)
    for weight_map in ({}, [], None):
        edit(sharded / INDEX, weight_map=weight_map)
        assert "no weight_map" in refusal(sharded)


# config.json


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": ...}, "model_type 'None'"),
        ({"model_type": ["llama"]}, "give a GGUF of it"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": 17}, "its shape is [316"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"hidden_size": True}, "hidden_size is 'True'"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"num_hidden_layers": 1}, "with 1 layers has no such tensor"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "a divisor of the 4 heads"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj.weight"),
        ({"head_dim": 7}, "head_dim is '7'"),
        ({"head_dim": 8}, "makes it"),
        ({"intermediate_size": 25}, "mlp"),
        ({"vocab_size": 999}, "write vocab_size 316 in config.json"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attention_bias": True}, "self_attn.q_proj.bias"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": 3}}, "type '3'"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "x"}}, "beta_fast"),
        (
            {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 5}},
            "at least low_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_refused_config(directory: Path, changes: dict, says: str) -> None:
    edit(directory / "config.json", **changes)
    assert says in refusal(directory)


def test_defaults_of_old_configs(directory: Path) -> None:
    """Configurations of the first Llama models lack what later became configurable."""
    missing: tuple[str, ...] = (
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
        "architectures",
    )
    missing += ("rms_norm_eps", "attention_bias", "mlp_bias", "max_position_embeddings")
    edit(directory / "config.json", **dict.fromkeys(missing, ...), rope_scaling=None)

    def change(tensors: dict) -> None:
        for layer in (0, 1):
            for part in "qkvo":
                name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
                tensors[name] = np.zeros((16, 16), np.float16)
            rotary = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[rotary] = np.zeros(2, np.float64)

    edit_tensors_as_f16(directory, change)
    model = HubModel(directory)
    metadata = model.metadata()
    for key, value in {
        "attention.head_count_kv": 4,
        "attention.key_length": 4,
        "context_length": 2048,
        "rope.freq_base": 10000.0,
    }.items():
        assert get_value(metadata, f"llama.{key}") == value
    assert "rope_freqs.weight" not in model.specs()
    assert not any("rotary" in name for name in model.specs())
    model.close()


def edit_tensors_as_f16(directory: Path, change: Callable[[dict], object]) -> None:
    """safetensors.numpy cannot read bf16, so all weights become f16 zeros of the same shapes."""
    model = HubModel(HUB / "llama3")
    tensors = {}
    for name, spec in model.specs().items():
        if hf := hf_name("llama", name):
            tensors[hf] = np.zeros(spec.shape, np.float16)
    model.close()
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_tied_models_drop_their_output(directory: Path) -> None:
    edit_tensors_as_f16(
        directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    model = HubModel(directory)
    assert "output.weight" not in model.specs()
    assert model.specs()["rope_freqs.weight"].dtype == "F32"
    model.close()


@pytest.mark.parametrize("dtype", ["float64", "int8", "uint8", "int32"])
def test_other_types_are_refused_by_name(directory: Path, dtype: str) -> None:
    edit_tensors_as_f16(directory, lambda t: t.update({"model.norm.weight": np.zeros(16, dtype)}))
    assert "'model.norm.weight': its type" in refusal(directory)


def test_unknown_tensor_is_refused(directory: Path) -> None:
    edit_tensors_as_f16(directory, lambda t: t.update({"visual.x": np.zeros(1, np.float16)}))
    assert "'visual.x'" in refusal(directory)


def test_linear_scaling_and_long_context(directory: Path) -> None:
    edit(
        directory / "config.json",
        rope_parameters=...,
        rope_theta=1e6,
        rope_scaling={"type": "linear", "factor": 4},
    )
    model = HubModel(directory)
    metadata = model.metadata()
    assert get_value(metadata, "llama.rope.scaling.type") == "linear"
    assert get_value(metadata, "llama.rope.scaling.factor") == 4.0
    assert get_value(metadata, "llama.rope.freq_base") == 1e6
    assert "rope_freqs.weight" not in model.specs()
    model.close()


def test_broken_model_card_is_left_out(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / "README.md").write_text("---\nlicense: [}\n---\n")
    model = HubModel(directory)
    assert get_value(model.metadata(), "general.name") == "model"
    assert "model card is left out" in caplog.text
    model.close()


def test_numbers_in_a_model_card_become_strings(directory: Path) -> None:
    (directory / "README.md").write_text("---\nversion: 1.5\ntags: [1, x]\n---\n")
    model = HubModel(directory)
    assert get_value(model.metadata(), "general.version") == "1.5"
    assert get_value(model.metadata(), "general.tags") == ["1", "x"]
    model.close()
