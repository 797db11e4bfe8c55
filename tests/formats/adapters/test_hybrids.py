"""An adapter of a hybrid or a mixture changes each tensor as a directory with the changed weights has it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats import open_model
from edgemerge.formats.adapters.names import BaseNames
from edgemerge.formats.hub.changes import Offset
from tests.support.adapters import FRONT, noise
from tests.support.architecture_models import convert
from tests.support.fake_source import FakeSource
from tests.support.generated_models import WEIGHTS, all_facts, make_model, stored_f32
from tests.support.safetensors_files import write_safetensors
from tests.support.sources import read_all

Float32 = NDArray[np.float32]

NAMES = [name for name in all_facts() if name != "gpt_oss"]  # whose experts are packed


def write_adapter(folder: Path, tensors: dict[str, Float32]) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["x"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(
        folder / "adapter_model.safetensors", {FRONT + name: x for name, x in tensors.items()}
    )
    return folder


def change_everything(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """Write a base, an adapter that changes all but stacks of experts, and the model that peft makes."""
    base, wanted = make_model(name, folder / "base"), make_model(name, folder / "wanted")
    stored = stored_f32(name)
    write_safetensors(base / WEIGHTS, stored)
    adapter: dict[str, Float32] = {}
    for i, (tensor, x) in enumerate(list(stored.items())):
        module, is_weight = tensor.removesuffix(".weight"), tensor.endswith(".weight")
        if "experts" in tensor or (x.ndim == 3 and "conv1d" not in tensor):
            continue
        if x.ndim != 2 or not is_weight:
            adapter[tensor] = noise(x.shape, i)
            stored[tensor] = adapter[tensor]
            continue
        a, b = noise((2, x.shape[1]), i), noise((x.shape[0], 2), 1000 + i)
        if "embed_tokens" in module:
            adapter |= {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
        else:
            adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        stored[tensor] = (x + b @ a / 2).astype(np.float32)
    write_safetensors(wanted / WEIGHTS, stored)
    return base, write_adapter(folder / "adapter", adapter), wanted


def read(reference: str | Path, step: int = 1 << 20) -> dict[str, Float32]:
    with closing(open_model(reference)) as source:
        return read_all(source, step)


def compare(found: dict[str, Float32], wanted: dict[str, Float32]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert np.allclose(found[name], x, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_every_module_changes_as_in_a_directory(name: str, tmp_path: Path) -> None:
    base, adapter, wanted = change_everything(name, tmp_path)
    before, right, whole = read(base), read(wanted), read(f"{base}+{adapter}")
    assert sum(not np.array_equal(x, before[n]) for n, x in right.items()) > len(right) // 2
    compare(whole, right)
    for step in (1, 5):  # blocks that cut heads and groups of heads
        parts = read(f"{base}+{adapter}", step)
        assert all(np.array_equal(parts[n], x) for n, x in whole.items())


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen3_next", "granite4_hybrid_moe"])
def test_a_gguf_of_a_hybrid_gives_the_same(name: str, tmp_path: Path) -> None:
    base, adapter, wanted = change_everything(name, tmp_path)
    compare(read(f"{convert(base, tmp_path / 'base.gguf')}+{adapter}"), read(wanted))


def test_a_gguf_whose_factors_are_lost_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = change_everything("falcon_h1", tmp_path)
    whole = convert(base, tmp_path / "base.gguf")
    with pytest.raises(MismatchError, match="no GGUF of falcon-h1 states by which factors"):
        open_model(f"{whole}+{adapter}")


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_5"])
def test_the_norms_of_dora_follow_too(name: str, tmp_path: Path) -> None:
    base, wanted = make_model(name, tmp_path / "base"), make_model(name, tmp_path / "wanted")
    stored, adapter = stored_f32(name), dict[str, Float32]()
    write_safetensors(base / WEIGHTS, stored)
    for tensor, x in list(stored.items()):
        if x.ndim != 2 or ".0." not in tensor:
            continue
        module = tensor.removesuffix(".weight")
        a, b = noise((2, x.shape[1]), 1), noise((x.shape[0], 2), 2)
        norms = np.abs(noise((x.shape[0],), 3)) + np.float32(0.25)
        adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        adapter[f"{module}.lora_magnitude_vector"] = norms
        changed = x + b @ a / 2
        lengths = np.linalg.norm(changed, axis=1, keepdims=True)
        stored[tensor] = norms[:, None] * changed / lengths
    write_safetensors(wanted / WEIGHTS, stored)
    folder = write_adapter(tmp_path / "adapter", adapter)
    compare(read(f"{base}+{folder}"), read(wanted))


def test_a_repeated_embedding_changes_the_head_too(tmp_path: Path) -> None:
    shapes = dict(all_facts()["falcon_h1"]["stored"])
    tied: dict[str, Any] = {"tie_word_embeddings": True, "lm_head_multiplier": 0.5}
    models = [make_model("falcon_h1", tmp_path / name, **tied) for name in ("base", "wanted")]
    stored = {n: x for n, x in stored_f32("falcon_h1").items() if n != "lm_head.weight"}
    write_safetensors(models[0] / WEIGHTS, stored)
    n_rows, n_cols = shapes["model.embed_tokens.weight"]
    a, b = noise((2, n_rows), 1), noise((n_cols, 2), 2)
    changed = stored["model.embed_tokens.weight"] + (b @ a).T / 2
    write_safetensors(models[1] / WEIGHTS, stored | {"model.embed_tokens.weight": changed})
    front = "model.embed_tokens.lora_embedding_"
    adapter = write_adapter(tmp_path / "adapter", {f"{front}A": a, f"{front}B": b})
    wanted = read(models[1])
    assert "output.weight" in wanted
    compare(read(f"{models[0]}+{adapter}"), wanted)


def train_experts(
    name: str, folder: Path, parts: tuple[str, ...], *, swapped: bool
) -> tuple[Path, Path, Path]:
    """Write a base, an adapter of all experts of a layer, and the model that peft makes."""
    base, wanted = make_model(name, folder / "base"), make_model(name, folder / "wanted")
    stored, adapter = stored_f32(name), dict[str, Float32]()
    write_safetensors(base / WEIGHTS, stored)
    for i, part in enumerate(parts):
        tensor = next(tensor for tensor in stored if tensor.endswith(f"experts.{part}"))
        n_experts, n_in, n_out = stored[tensor].shape
        a = noise((n_experts * 2, n_out if swapped else n_in), 2 * i + 1)
        b = noise((n_in if swapped else n_out, 2 * n_experts), 2 * i + 2)
        # `ParamWrapper.get_delta_weight`
        factors = b.reshape(len(b), 2, n_experts), a.reshape(n_experts, 2, -1)
        change = np.einsum("ore,eri->eoi" if swapped else "ore,eri->eio", *factors) / 2
        stored[tensor] = (stored[tensor] + change).astype(np.float32)
        module = tensor.removesuffix(f".{part}") + ".base_layer" * (part == "gate_up_proj")
        adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    write_safetensors(wanted / WEIGHTS, stored)
    return base, write_adapter(folder / "adapter", adapter), wanted


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpt_oss_plain", ("gate_up_proj", "down_proj")),  # the first one is square
        ("gpt_oss_plain", ("down_proj",)),
        ("llama4", ("gate_up_proj",)),
    ],
)
def test_experts_that_are_stored_transposed(
    name: str, parts: tuple[str, ...], swapped: bool, tmp_path: Path
) -> None:
    """Fault: a square parameter never counted as swapped, and its change was added transposed."""
    base, adapter, wanted = train_experts(name, tmp_path, parts, swapped=swapped)
    whole = read(f"{base}+{adapter}")
    compare(whole, read(wanted))
    blocks = read(f"{base}+{adapter}", 5)
    assert all(np.array_equal(blocks[n], x) for n, x in whole.items())


def test_a_square_parameter_of_experts_alone_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = train_experts("gpt_oss_plain", tmp_path, ("gate_up_proj",), swapped=False)
    with pytest.raises(FormatError, match=r"no other tensor tells which side is in .* merge it in"):
        open_model(f"{base}+{adapter}")


@pytest.mark.parametrize("architecture", ["gemma", "nemotron"])
def test_norms_to_which_a_converter_adds_1(architecture: str) -> None:
    names = BaseNames(FakeSource("base.gguf", architecture=architecture))
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):
        (target,) = names.find(name)
        assert target.change == Offset(1.0)
    (target,) = names.find("model.layers.0.self_attn.q_proj.weight")
    assert target.change is None


def test_fewer_counts_of_heads_than_layers_are_refused() -> None:
    """Fault: an IndexError."""
    heads = {"llama.attention.head_count": ([4, 4], "[i32]")}
    names = BaseNames(FakeSource("base.gguf", n_layers=3, metadata=heads))
    assert names.find("model.layers.1.self_attn.q_proj.weight")[0].order.half == 32
    with pytest.raises(FormatError, match=r"states no llama\.attention\.head_count that divides"):
        names.find("model.layers.2.self_attn.q_proj.weight")


def test_a_gguf_without_the_counts_of_its_heads_is_refused() -> None:
    with pytest.raises(FormatError, match=r"states no qwen35\.ssm\.conv_kernel, by which"):
        BaseNames(FakeSource("base.gguf", architecture="qwen35"))
