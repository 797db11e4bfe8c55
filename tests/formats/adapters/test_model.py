"""Several adapters, weights, GGUF adapters, and adapters that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgemerge.errors import EdgemergeError
from edgemerge.formats import open_model
from edgemerge.formats.adapters.config import AdapterConfig
from edgemerge.merging.delta import DeltaSettings, make_delta
from tests.support.adapters import FRONT, KINDS, Kind, pair, tensors_of, write_adapter
from tests.support.architecture_models import ARCHITECTURES, convert
from tests.support.sources import read_all
from tests.support.tiny_gguf import write_tiny_gguf

Float32 = NDArray[np.float32]

LLAMA, QWEN = ARCHITECTURES / "llama", ARCHITECTURES / "qwen2"
UP = f"{FRONT}model.layers.0.mlp.up_proj"


def read(reference: str) -> dict[str, Float32]:
    with closing(open_model(reference)) as source:
        return read_all(source)


def refusal(reference: str) -> str:
    with pytest.raises(EdgemergeError) as caught, closing(open_model(reference)):
        pass
    return str(caught.value)


def up_change(kind: Kind) -> Float32:
    """What an adapter of alpha 6 and rank 4 adds to `blk.0.ffn_up.weight`."""
    tensors = tensors_of(kind)
    product: Float32 = tensors[f"{UP}.lora_B.weight"] @ tensors[f"{UP}.lora_A.weight"]
    return np.float32(1.5) * product


def test_several_adapters_are_added_by_weight(tmp_path: Path) -> None:
    first, second = KINDS["lora"], replace(KINDS["lora"], scale={"lora_A": 0.3})
    paths = [write_adapter(kind, tmp_path / f"a{i}") for i, kind in enumerate((first, second))]
    base = read(str(LLAMA))["blk.0.ffn_up.weight"]
    found = read(f"{LLAMA}+0.5*{paths[0]}+-2*{paths[1]}")["blk.0.ffn_up.weight"]
    expected = base + np.float32(0.5) * up_change(first) - np.float32(2) * up_change(second)
    assert np.allclose(found, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", ["dora", "bias", "modules_to_save"])
def test_a_weight_scales_the_whole_change(kind: str, tmp_path: Path) -> None:
    adapter = write_adapter(KINDS[kind], tmp_path / "adapter")
    base, whole = read(str(LLAMA)), read(f"{LLAMA}+{adapter}")
    third = read(f"{LLAMA}+0.25*{adapter}")
    both = read(f"{LLAMA}+0.25*{adapter}+0.75*{adapter}")
    assert any(not np.array_equal(base[name], x) for name, x in whole.items())
    for name, x in whole.items():
        expected = base[name] + np.float32(0.25) * (x - base[name])
        assert np.allclose(third[name], expected, rtol=0, atol=3e-7), name
        assert np.allclose(both[name], x, rtol=0, atol=5e-7), name


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
def test_a_gguf_adapter_is_added_as_llama_cpp_does(dtype: str, tmp_path: Path) -> None:
    rank = 32 if dtype == "Q8_0" else 4
    rng = np.random.default_rng(0)
    base = write_tiny_gguf(tmp_path / "base.gguf")
    kept = gguf.GGMLQuantizationType[dtype]
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8)
    factors = {}
    before = read(str(base))
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight"):
        out, inner = before[name].shape
        shapes = {"a": (rank, inner), "b": (out, rank)}
        if name == "token_embd.weight":  # a row for each token, and B as PEFT has it
            shapes = {"a": (out, rank), "b": (inner, rank)}
        for end, shape in shapes.items():
            stored = gguf.quantize(rng.standard_normal(shape).astype(np.float32), kept)
            writer.add_tensor(f"{name}.lora_{end}", stored, raw_dtype=kept)
            factors[name, end] = gguf.dequantize(stored, kept).astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    after = read(f"{base}+{tmp_path / 'adapter.gguf'}")
    for name, x in before.items():
        change = np.zeros_like(x)
        if (name, "a") in factors:
            a, b = factors[name, "a"], factors[name, "b"]
            change = np.float32(8 / rank) * (a @ b.T if name == "token_embd.weight" else b @ a)
        assert np.allclose(after[name], x + change, rtol=0, atol=1e-5), name


def test_each_expert_may_have_its_own_adapter(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in (0, 3):
        shapes |= pair(f"model.layers.1.block_sparse_moe.experts.{expert}.w2", 32, 32)
    kind = Kind("mixtral", {}, shapes)
    adapter, tensors = write_adapter(kind, tmp_path / "adapter"), tensors_of(kind)
    base = ARCHITECTURES / "mixtral"
    before, after = read(str(base)), read(f"{base}+{adapter}")
    expected = before["blk.1.ffn_down_exps.weight"].copy()
    for expert in (0, 3):
        name = f"{FRONT}model.layers.1.block_sparse_moe.experts.{expert}.w2.lora_"
        expected[expert] += np.float32(1.5) * (
            tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
        )
    assert np.allclose(after["blk.1.ffn_down_exps.weight"], expected, rtol=0, atol=3e-7)
    assert {n for n, x in after.items() if not np.array_equal(x, before[n])} == {
        "blk.1.ffn_down_exps.weight"
    }


def test_experts_of_older_peft_have_in_and_out_the_other_way_round(tmp_path: Path) -> None:
    """`ParamWrapper` of peft 0.17: the change of expert e is (B_e A_e)^T."""
    name = f"{FRONT}model.layers.0.mlp.experts"
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.lora_A.weight": (12, 32),
        f"{name}.lora_B.weight": (24, 12),
    }
    kind = Kind("qwen3_moe", {"r": 3}, shapes)
    adapter, tensors = write_adapter(kind, tmp_path / "adapter"), tensors_of(kind)
    a = tensors[f"{name}.lora_A.weight"].reshape(4, 3, 32)
    b = tensors[f"{name}.lora_B.weight"].reshape(24, 3, 4)
    base = ARCHITECTURES / "qwen3_moe"
    before, after = read(str(base)), read(f"{base}+{adapter}")
    change = np.float32(2) * np.einsum("ore,eri->eio", b, a)
    expected = before["blk.0.ffn_down_exps.weight"] + change
    assert np.allclose(after["blk.0.ffn_down_exps.weight"], expected, rtol=0, atol=5e-7)


def test_conv1d_modules_of_gpt2_are_stored_the_other_way_round(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 8)).astype(np.float32)  # as GGUF has it: (out, in)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "gpt2")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_qkv.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kind = Kind("gpt2", {"fan_in_fan_out": True}, pair("transformer.h.0.attn.c_attn", 24, 8))
    adapter, tensors = write_adapter(kind, tmp_path / "adapter"), tensors_of(kind)
    a, b = tensors.values()
    # peft adds (B A)^T to a weight of (in, out), which GGUF's converter transposes.
    expected = (weight.T + np.float32(1.5) * (b @ a).T).T
    found = read(f"{tmp_path / 'base.gguf'}+{adapter}")["blk.0.attn_qkv.weight"]
    assert np.allclose(found, expected, rtol=0, atol=3e-7)


def test_a_head_of_its_own_is_given_to_a_tied_base(tmp_path: Path) -> None:
    kind = Kind("qwen2", {}, pair("lm_head", 336, 32))
    adapter, tensors = write_adapter(kind, tmp_path / "adapter"), tensors_of(kind)
    a, b = tensors.values()
    before, after = read(str(QWEN)), read(f"{QWEN}+{adapter}")
    assert np.array_equal(after["token_embd.weight"], before["token_embd.weight"])
    expected = before["token_embd.weight"] + np.float32(1.5) * (b @ a)
    assert np.allclose(after["output.weight"], expected, rtol=0, atol=3e-7)
    with closing(open_model(f"{QWEN}+{adapter}")) as source:
        assert source.notes()[-1].endswith("the adapter gives the model a head of its own")


def test_tokens_are_those_of_their_module(tmp_path: Path) -> None:
    """Fault: the first list stood for all modules."""
    tokens = {"embed_tokens": [3, 5], "lm_head": [7, 1]}
    shapes: dict[str, tuple[int, ...]] = {
        f"{FRONT}{module}.token_adapter.trainable_tokens_delta": (2, 32)
        for module in ("model.embed_tokens", "lm_head")
    }
    kind = Kind("llama", {"trainable_token_indices": tokens}, shapes)
    adapter, tensors = write_adapter(kind, tmp_path / "adapter"), tensors_of(kind)
    before, after = read(str(LLAMA))["token_embd.weight"], read(f"{LLAMA}+{adapter}")
    names = ("token_embd.weight", "output.weight")
    for name, rows, trained in zip(names, tensors.values(), tokens.values(), strict=True):
        changed = np.flatnonzero((after[name] != before).any(axis=1))
        assert changed.tolist() == sorted(trained)
        assert np.array_equal(after[name][trained], rows)


@pytest.mark.parametrize("first", ["embedding", "tokens", "delta"])
def test_a_head_of_its_own_has_the_changes_of_the_embedding(first: str, tmp_path: Path) -> None:
    """Fault: of the adapter that changes the embedding, which is the head too, the head had nothing."""
    whole = convert(QWEN, tmp_path / "base.gguf")
    head = write_adapter(Kind("qwen2", {}, pair("lm_head", 336, 32)), tmp_path / "head")
    kind = KINDS["tokens" if first == "tokens" else "embedding"]
    other = write_adapter(kind, tmp_path / "other")
    if first == "delta":
        expert, other = f"{whole}+{other}", tmp_path / "other.gguf"
        make_delta(whole, expert, other, DeltaSettings(bits=8))
    before, own, alone = read(str(whole)), read(f"{whole}+{head}"), read(f"{whole}+{other}")
    change = own["output.weight"] - before["token_embd.weight"]
    for uses in (f"{head}+{other}", f"{other}+{head}"):
        both = read(f"{whole}+{uses}")
        assert np.array_equal(both["token_embd.weight"], alone["token_embd.weight"])
        expected = alone["token_embd.weight"] + change
        assert np.allclose(both["output.weight"], expected, rtol=0, atol=5e-7)


# -- what does not fit -------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Float32]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def configured(**entries: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


def renamed(new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_model.safetensors").rename(folder / new)  # type: ignore[return-value]


def _named(tensors: dict[str, Float32], adapter: str, module: str) -> dict[str, Float32]:
    """Take the factors of a module out of a file, and return them under an adapter's name."""
    return {
        name.replace(".weight", f".{adapter}.weight"): tensors.pop(name)
        for name in list(tensors)
        if f".{module}." in name
    }


A = f"{UP}.lora_A.weight"
SECOND = "is of a second adapter in the file; save each adapter in a folder of its own"
EMBEDDING = f"{FRONT}model.embed_tokens"
MISTAKES: list[tuple[Callable[[Path], None], str]] = [
    (
        changed(lambda t: t.update({A: np.ones((4, 16), np.float32)})),
        f"tensor '{A}' of the adapter is [4, 16], which does not fit 'blk.0.ffn_up.weight' of [48, 32] in ",
    ),
    (
        changed(lambda t: t.update({f"{FRONT}model.layers.9.x.lora_A.weight": t[A]})),
        "stands without lora_B; get the adapter again",
    ),
    (changed(lambda t: t.pop(A)), "stands without lora_A; get the adapter again"),
    (
        changed(lambda t: t.update({A: np.ones((5, 32), np.float32)})),
        "is [5, 32], which is no A for the B of [48, 4]",
    ),
    (
        changed(lambda t: t.update({A: np.ones((4, 32), np.int8)})),
        "its type I8 is not one of F32, F16, BF16; save the adapter in one of these",
    ),
    (
        changed(lambda t: t.update({f"{FRONT}model.layers.5.mlp.up_proj.weight": t[A]})),
        "of the adapter has no counterpart in ",
    ),
    (
        configured(peft_type="IA3"),
        "is an adapter of the kind 'IA3', and only LORA is read; merge it ",
    ),
    (
        configured(alora_invocation_tokens=[1]),
        "acts only after certain tokens (aLoRA), which no weig",
    ),
    (
        configured(init_lora_weights="pissa_niter_4"),
        "began from the base's own weights (pissa_niter_",
    ),
    (
        configured(layer_replication=[[0, 2]]),
        "repeats layers of its base, which no weight can stand",
    ),
    (
        configured(rank_pattern={"(a+)+$": 3}),
        "its rank_pattern has the pattern '(a+)+$', which is no",
    ),
    (configured(alpha_pattern={"q_proj": "x"}), "its alpha_pattern has no number for 'q_proj'"),
    (configured(r=0), "has the rank 0, and its factors have 4; get both files of one adapter"),
    (configured(r=8), "has the rank 8, and its factors have 4; get both files of one adapter"),
    (configured(rank_pattern={"up_proj": 2}), "mlp.up_proj has the rank 2, and its factors have 4"),
    (configured(lora_alpha="much"), "its lora_alpha is no number; get the file again"),
    # Fault: the last adapter of a file counted, or the first one of what is saved whole.
    (
        changed(lambda t: t.update({f"{UP}.lora_A.{n}.weight": t[A] for n in ("default", "ref")})),
        SECOND,
    ),
    (changed(lambda t: t.update({f"{UP}.lora_A.default.weight": t[A]})), SECOND),
    (
        changed(lambda t: t.update(_named(t, "default", "q_proj") | _named(t, "ref", "v_proj"))),
        SECOND,
    ),
    (
        changed(
            lambda t: t.update(
                {
                    f"{EMBEDDING}.modules_to_save.{name}.weight": np.ones((336, 32), np.float32)
                    for name in ("default", "ref")
                }
            )
        ),
        SECOND,
    ),
    (
        renamed("adapter_model.bin"),
        "holds its factors as pickle only (adapter_model.bin), which is ",
    ),
    (renamed("gone"), "has no adapter_model.safetensors; get it too"),
]


@pytest.mark.parametrize(("edit", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_an_adapter_that_does_not_fit_is_refused(
    edit: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    adapter = write_adapter(KINDS["lora"], tmp_path / "adapter")
    edit(adapter)
    assert message in refusal(f"{LLAMA}+{adapter}")


def test_the_refusal_names_the_right_base(tmp_path: Path) -> None:
    adapter = write_adapter(KINDS["fused"], tmp_path / "adapter")
    found = refusal(f"{LLAMA}+{adapter}")
    assert found.endswith(
        f"has no counterpart in {LLAMA}; give the model that it was made for, 'phi3'"
    )


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = convert(LLAMA, tmp_path / "base.gguf")
    found = refusal(f"{base}+{tmp_path / 'adapter.gguf'}")
    assert "is an adapter of a qwen2 model and" in found
    assert refusal(f"{base}+{base}").endswith("is no LoRA adapter; give one after the plus")
    assert "is no adapter: it has no adapter_config.json" in refusal(f"{base}+{LLAMA}")


def test_a_base_of_another_name_is_noted(tmp_path: Path) -> None:
    kind = replace(KINDS["lora"], config={"base_model_name_or_path": "org/Vicuna-13B"})
    adapter = write_adapter(kind, tmp_path / "adapter")
    with closing(open_model(f"{LLAMA}+{adapter}")) as source:
        assert source.notes()[-1] == (
            "adapter was made for 'org/Vicuna-13B', and its shapes fit llama; see that this is the same model"
        )


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(KINDS["lora"], tmp_path / "adapter")
    changed(lambda t: t[A].__setitem__((0, 0), np.nan))(adapter)
    with pytest.raises(EdgemergeError, match="holds NaN or infinity; the adapter is damaged"):
        read(f"{LLAMA}+{adapter}")


def test_patterns_may_name_modules_of_a_tower(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.self_attn.q_proj"
    config = {"r": 16, "lora_alpha": 16, "rank_pattern": {name: 4}, "alpha_pattern": {name: 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    names = (f"{name}.base_layer", "model.layers.0.self_attn.q_proj")
    assert AdapterConfig(tmp_path).scale(names, 4) == 0.5
