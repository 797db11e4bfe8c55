"""Directories of Qwen3-Next and Qwen3.5: as they are published, and what llama.cpp does not compute."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.hub.model import HubModel
from tests.support.generated_models import WEIGHTS, make_model, write_tensors
from tests.support.safetensors_files import read_safetensors

SECTIONS = "mrope_section"
HUGE = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), (1 << 31) - 1)


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        HubModel(folder)
    return str(caught.value)


def everything(folder: Path) -> tuple[dict[str, bytes], dict[str, bytes], list[str]]:
    """Tensors, metadata but for the name, and notes."""
    model, tensors = HubModel(folder), {}
    for name, spec in model.specs().items():
        raw = np.empty(spec.nbytes, np.uint8)
        model.read_rows(name, 0, spec.n_rows, raw)
        tensors[name] = raw.tobytes()
    metadata, notes = dict(model.metadata()), list(model.notes())
    del metadata["general.name"]
    model.close()
    return tensors, metadata, notes


def save(folder: Path, tensors: dict[str, Any]) -> None:
    """Write tensors as BF16, which has their values."""
    write_tensors(
        folder / WEIGHTS, {k: (x.view("<u4") >> 16).astype("<u2") for k, x in tensors.items()}
    )


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_model_beside_a_vision_tower(name: str, tmp_path: Path) -> None:
    """As published: with a tower, a layer that guesses on, and a layer's experts in two tensors."""
    plain = everything(make_model(name, tmp_path / "plain"))
    folder = make_model(name, tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    classes = [config.pop("architectures")[0].replace("ForCausalLM", "ForConditionalGeneration")]
    whole = {"architectures": classes, "model_type": name, "text_config": config}
    (folder / "config.json").write_text(json.dumps(whole | {"vision_config": {"hidden_size": 8}}))
    tensors = stack_experts(read_safetensors(folder / WEIGHTS))
    renamed = {key.replace("model.", "model.language_model.", 1): x for key, x in tensors.items()}
    extra = {
        key: np.ones(8, np.float32) for key in ("model.visual.merger.norm.bias", "mtp.norm.weight")
    }
    save(folder, renamed | extra)
    found = everything(folder)
    assert found[:2] == plain[:2]
    assert found[2] == [
        f"whole: tensors that the language model does not use are left out: {', '.join(extra)}"
    ]


def stack_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """Join the experts of each layer, gate above up."""
    rest = {key: x for key, x in tensors.items() if ".experts." not in key}
    layers = {key.split(".experts.")[0] for key in tensors.keys() - rest.keys()}
    for layer in sorted(layers):
        gate, up, down = (
            np.stack([tensors[f"{layer}.experts.{i}.{part}_proj.weight"] for i in range(4)])
            for part in ("gate", "up", "down")
        )
        rest[f"{layer}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        rest[f"{layer}.experts.down_proj"] = down
    return rest


def test_layers_by_their_period(tmp_path: Path) -> None:
    plain = everything(make_model("qwen3_5", tmp_path / "plain"))
    older = make_model("qwen3_5", tmp_path / "older", layer_types=None, full_attention_interval=4)
    assert everything(older)[:2] == plain[:2]


def test_a_part_that_is_null_is_not_stated(tmp_path: Path) -> None:
    """Fault: a TypeError."""
    plain = make_model("qwen3_5", tmp_path / "plain")
    rope = json.loads((plain / "config.json").read_text())["rope_parameters"]
    key = "partial_rotary_factor"
    changes = {"rope_parameters": rope | {key: None}, key: rope[key]}
    null = make_model("qwen3_5", tmp_path / "null", **changes)
    assert everything(null) == everything(plain)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen3_5", {"linear_value_head_dim": 4}, "with linear_key_head_dim, 8; this one cannot be"),
        ("qwen3_5", {"linear_num_value_heads": 3}, "must be a multiple of the 2 of keys"),
        ("qwen3_5", {"linear_num_value_heads": 1 << 30}, "must be an integer from 1 to 16384"),
        ("qwen3_5_moe", {"num_experts": 1 << 30}, "must be an integer from 1 to 16384"),
        ("qwen3_5", {"linear_num_value_heads": 8}, "config.json makes it [8]"),
        ("qwen3_5", HUGE, "linear_value_head_dim of 2147483647 makes a size of 1.29e+10, it must be"),
        ("qwen3_5", {"linear_conv_kernel_dim": 3}, "its shape is [80, 1, 4] but config.json makes it"),
        ("qwen3_5", {"layer_types": ["full_attention"] * 4}, "has no such tensor"),
        ("qwen3_5", {"layer_types": ["conv"] * 4}, "must be a list of 4 of linear_attention"),
        ("qwen3_5", {"full_attention_interval": 0}, "must be an integer from 1"),
        ("qwen3_5", {"attention_bias": True}, "attention_bias is 'True'"),
        ("qwen3_5", {"rope_parameters": {SECTIONS: [9, 9]}}, "must be a list of three numbers"),
        ("qwen3_5", {"rope_parameters": {SECTIONS: [9, 9, "1"]}}, "must be a list of three numbers"),
        ("qwen3_5", {"rope_parameters": {SECTIONS: [8, 8, 8]}}, "sections of 16 elements at most"),
        ("qwen3_5", {"rope_parameters": {SECTIONS: [4, 0, 0]}}, "sections that cover 2 pairs"),
        ("qwen3_5", {"rope_parameters": {"rope_type": "llama3"}}, "type 'llama3'"),
        ("qwen3_5_moe", {"num_experts": 5}, "mlp.gate.weight': its shape is [4, 32]"),
        ("qwen3_5_moe", {"shared_expert_intermediate_size": 8}, "makes it [32, 8]"),
        ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob is 'False'"),
        ("qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers is '[0]'"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "[80, 1, 4] but config.json makes it [96, 1"),
    ],
)  # fmt: skip
def test_refused_by_name(name: str, changes: dict, says: str, tmp_path: Path) -> None:
    assert says in refusal(make_model(name, tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("qwen3_next", "model.layers.1.linear_attn.in_proj_qkvz.weight"),
        ("qwen3_5", "model.layers.2.linear_attn.A_log"),
        ("qwen3_5", "model.layers.3.self_attn.q_proj.weight"),
        ("qwen3_5_moe", "model.layers.3.mlp.experts.2.up_proj.weight"),
        ("qwen3_5_moe", "model.layers.0.mlp.shared_expert_gate.weight"),
    ],
)
def test_a_missing_tensor_is_named(name: str, missing: str, tmp_path: Path) -> None:
    folder = make_model(name, tmp_path)
    tensors = read_safetensors(folder / WEIGHTS)
    del tensors[missing]
    save(folder, tensors)
    assert f"tensor '{missing}': is missing" in refusal(folder)
