"""Mixtures of dense experts: values as mergekit-moe gives them, and what llama.cpp computes."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import FormatError, MismatchError, OutputError, RecipeError, VerificationError
from edgemerge.formats import open_model
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.merging.run import merge, plan
from edgemerge.planning.mixtures import open_with_gates
from edgemerge.provenance.inputs import check_inputs
from edgemerge.recipe.recipe import load_recipe
from edgemerge.types import Recipe
from tests.support.architecture_models import ARCHITECTURES, convert, facts, logits
from tests.support.safetensors_files import read_safetensors, write_safetensors
from tests.support.small_models import load_gguf, load_hub, stored

# Every 32nd value of the gates that mergekit-moe 0.1.5 makes of these models and prompts (transformers
# 5.24), in float32. Its experts are the sources' values.
PROMPTS = (
    {"positive_prompts": ["Which disease", "fever and cough"]},
    {"positive_prompts": ["Which substance"], "negative_prompts": ["disease"]},
)
GATES = (
    (
        0.09472094,
        0.02714315,
        0.11226294,
        -0.08199584,
        -0.00531453,
        0.00001240,
        0.02007598,
        0.05398968,
    ),
    (
        0.05772335,
        0.06421120,
        -0.06339807,
        0.00916869,
        0.00512197,
        -0.03075472,
        -0.00992934,
        -0.05243242,
    ),
)
# The same of gate_mode hidden, of layers 0 and 3, where transformers computes in bfloat16; its tokenizer has
# `legacy: true`, so that a prompt's first word is cut as llama.cpp does.
HIDDEN = {
    0: (
        (-0.01587, -0.11182, -0.00212, 0.03125, -0.04004, 0.00424, -0.03369, 0.13184),
        (0.00146, 0.11768, 0.01978, 0.06396, -0.03149, 0.02283, 0.01794, -0.1377),
    ),
    3: (
        (-0.00237, 0.03906, -0.05396, -0.0708, -0.05933, 0.09131, 0.00349, 0.05249),
        (0.05225, 0.03491, 0.05737, -0.03296, 0.02991, -0.02393, 0.0835, 0.05103),
    ),
}
WEIGHTS = ("ffn_gate", "ffn_up", "ffn_down")


def make(
    folder: Path, base: Path, experts: list[dict[str, Any]], *, threads: int = 1, **keys: Any
) -> Path:
    """Merge a mixture to F32 in a folder; random gates unless said otherwise."""
    document = {
        "base_model": str(base),
        "gate_mode": "random",
        "experts": experts,
        "dtype": "float32",
    }
    recipe = folder / "mixture.yml"
    recipe.write_text(json.dumps(document | keys))
    target = folder / "out.gguf"
    merge(load_recipe(recipe), target, threads=threads, force=True)
    return target


def experts_of(*paths: Path) -> list[dict[str, Any]]:
    return [{"source_model": str(path)} for path in paths]


@pytest.mark.llama
def test_gates_and_experts_are_mergekit_s(models_dir: Path, tmp_path: Path) -> None:
    paths = [models_dir / "expert-a", models_dir / "expert-b"]
    experts = [one | prompts for one, prompts in zip(experts_of(*paths), PROMPTS, strict=True)]
    made = load_gguf(make(tmp_path, models_dir / "base", experts, gate_mode="cheap_embed"))
    models = [load_hub(path / "model.safetensors") for path in paths]
    for layer in range(4):
        gates = made[f"blk.{layer}.ffn_gate_inp.weight"]
        np.testing.assert_allclose(gates[:, ::32], GATES, rtol=0, atol=1e-7)
        for name in WEIGHTS:
            stack = made[f"blk.{layer}.{name}_exps.weight"]
            parts = [model[f"blk.{layer}.{name}.weight"].astype(np.float32) for model in models]
            np.testing.assert_array_equal(stack, np.stack(parts))
    base = load_hub(models_dir / "base" / "model.safetensors")
    for name, values in base.items():
        if "norm" in name or name.endswith(("_embd.weight", "attn_v.weight", "attn_output.weight")):
            np.testing.assert_array_equal(made[name], values.astype(np.float32))


@pytest.mark.llama
def test_hidden_states_are_what_mergekit_takes(models_dir: Path, tmp_path: Path) -> None:
    paths = [models_dir / "expert-a", models_dir / "expert-b"]
    experts = [one | prompts for one, prompts in zip(experts_of(*paths), PROMPTS, strict=True)]
    base = convert(models_dir / "base", tmp_path / "base.gguf")
    file = make(tmp_path, base, experts, gate_mode="hidden")
    check_inputs(file, [base, *paths])
    made = load_gguf(file)
    for layer, wanted in HIDDEN.items():
        gates = made[f"blk.{layer}.ffn_gate_inp.weight"]
        np.testing.assert_allclose(gates[:, ::32], wanted, rtol=0, atol=3e-3)
        np.testing.assert_allclose((gates**2).sum(axis=1), 1, rtol=1e-6)


@pytest.mark.llama
def test_a_directory_becomes_a_gguf_that_llama_cpp_can_run(
    models_dir: Path, tmp_path: Path
) -> None:
    """As F16, which is how the directory has its weights. The file is removed, and plans need none."""
    base, other = tmp_path / "models" / "base", models_dir / "expert-a"
    shutil.copytree(models_dir / "base", base)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    # So that the first word after bos is cut as llama.cpp does.
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"legacy": True}))
    experts = [
        one | prompts for one, prompts in zip(experts_of(other, other), PROMPTS, strict=True)
    ]
    made = make(tmp_path, base, experts, gate_mode="hidden")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mixture.yml", "models", "out.gguf"]
    found = gates_of(made)
    file = convert(base, tmp_path / "base.gguf")
    other_way = gates_of(make(tmp_path, file, experts, gate_mode="hidden"))
    assert (found * other_way).sum(axis=2).min() > 0.9999
    made = make(tmp_path, base, experts, gate_mode="hidden")
    with pytest.raises(VerificationError, match="check it by edgemerge verify"):
        check_inputs(made, [base, other])
    folders = list[Path]()

    def merge_one(recipe: Recipe, output: Path) -> None:
        folders.append(output.parent)
        merge(recipe, output)

    check_inputs(made, [base, other], merge_one=merge_one)
    assert folders == [tmp_path / "out.gguf.base.part"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["base.gguf", "mixture.yml", "models", "out.gguf"]


def test_a_copy_of_the_base_that_a_killed_run_left_is_replaced(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: it had another name each time, and nobody removed it."""
    base, recipe = models_dir / "base", tmp_path / "mixture.yml"
    experts = [one | prompts for one, prompts in zip(experts_of(base, base), PROMPTS, strict=True)]
    document = {"base_model": str(base), "gate_mode": "hidden", "experts": experts}
    recipe.write_text(json.dumps(document))
    asked, output = load_recipe(recipe), tmp_path / "out.gguf"
    mixture: Any = asked.mixture
    beside = tmp_path / "out.gguf.base.part"

    def read_copy(*_given: Any, runnable: Path) -> bytes:
        return runnable.read_bytes()

    def convert(_copy: Recipe, target: Path) -> None:
        assert not target.exists()
        target.write_bytes(b"made")
        with pytest.raises(OutputError, match="another merge is writing it; wait for that one"):
            open_with_gates(asked, mixture, output, ExitStack(), convert)

    def fail(_copy: Recipe, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("edgemerge.planning.mixtures.open_mixture", read_copy)
    for merge_one in (convert, fail):
        beside.mkdir()
        for name in ("base.gguf", "base.gguf.part", "base.gguf.part.journal"):
            (beside / name).write_bytes(b"left")
        with suppress(KeyboardInterrupt):
            found: Any = open_with_gates(asked, mixture, output, ExitStack(), merge_one)
            assert found == b"made"
        assert [path.name for path in tmp_path.iterdir()] == ["mixture.yml"]


def test_a_damaged_expert_is_named(models_dir: Path, tmp_path: Path) -> None:
    """As a copy, and where experts are converted as they are scaled."""
    folder = tmp_path / "expert"
    shutil.copytree(models_dir / "expert-a", folder)
    tensors = read_safetensors(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name][1, 3] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)
    width = tensors[name].shape[1]
    sound = models_dir / "expert-a"
    for scale in ({}, {"residual_scale": 0.5}):
        experts = experts_of(sound, folder)
        with pytest.raises(FormatError, match=f"index {width + 3}; that model is damaged") as found:
            make(tmp_path, models_dir / "base", [one | scale for one in experts])
        assert found.value.path == folder
        assert "'blk.2.ffn_down.weight'" in str(found.value)


def dense_models(name: str, folder: Path) -> list[Path]:
    """Take a mixture of transformers apart into dense models, one for each expert."""
    source = ARCHITECTURES / name
    config = json.loads((source / "config.json").read_text())
    tensors = read_safetensors(source / "model.safetensors")
    is_qwen = name == "qwen3_moe"
    config["model_type"] = "qwen3" if is_qwen else "llama"
    config["architectures"] = ["Qwen3ForCausalLM" if is_qwen else "LlamaForCausalLM"]
    config["intermediate_size"] = config.get("moe_intermediate_size", config["intermediate_size"])
    roles = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    count = config.get("num_experts") or config["num_local_experts"]
    paths = []
    for i in range(count):
        path = folder / f"dense-{i}"
        path.mkdir()
        kept = {}
        for key, value in tensors.items():
            if ".experts." in key:
                prefix, _, rest = key.partition(".experts.")
                number, role, _ = rest.split(".")
                if int(number) == i:
                    layer = prefix.rpartition(".")[0]
                    kept[f"{layer}.mlp.{roles.get(role, role)}.weight"] = value
            elif not key.endswith((".mlp.gate.weight", "block_sparse_moe.gate.weight")):
                kept[key] = value
        write_safetensors(path / "model.safetensors", kept)
        (path / "config.json").write_text(json.dumps(config))
        for file in source.iterdir():
            if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
                (path / file.name).write_bytes(file.read_bytes())
        paths.append(path)
    return paths


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_it_is_what_the_converter_makes_of_the_whole(name: str, tmp_path: Path) -> None:
    """But for gates, names, and the order of tensors."""
    whole = convert(ARCHITECTURES / name, tmp_path / "whole.gguf")
    paths = dense_models(name, tmp_path)
    config = json.loads((ARCHITECTURES / name / "config.json").read_text())
    made = make(
        tmp_path, paths[0], experts_of(*paths), experts_per_token=config["num_experts_per_tok"]
    )
    ours, theirs = stored(made), stored(whole)
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        if "ffn_gate_inp" not in tensor:
            assert ours[tensor] == theirs[tensor], tensor
    found, wanted = (open_model(path).metadata() for path in (made, whole))
    keys = {k for k in {*found, *wanted} if not k.startswith(("general.", "edgemerge."))}
    # The width of a dense layer, which llama.cpp does not read where all layers have experts.
    keys.discard("qwen3moe.feed_forward_length")
    if name == "mixtral":  # whose head_dim is not stated, as it is the quotient of others
        keys -= {"llama.attention.key_length", "llama.attention.value_length"}
    assert {k: found.get(k) for k in keys} == {k: wanted.get(k) for k in keys}


@pytest.mark.llama
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_equal_experts_answer_as_the_dense_model(name: str, tmp_path: Path) -> None:
    """Whatever the gates are, as the weights of the chosen experts add up to 1."""
    from edgemerge.runtime.llama import Model

    dense = ARCHITECTURES / name
    made = make(tmp_path, dense, experts_of(dense, dense, dense))
    tokens = facts(name)["tokens"]
    wanted = [False] * (len(tokens) - 1) + [True]
    with (
        Model(made, n_threads=1) as model,
        model.context(128, n_batch=64, exact=True) as context,
    ):
        found = context.decode(tokens, wanted)
        np.testing.assert_allclose(found[0], logits(name, "plain")[-1], rtol=0, atol=1e-3)


def gates_of(path: Path) -> np.ndarray:
    found = load_gguf(path)
    return np.stack([found[name] for name in sorted(found) if "ffn_gate_inp" in name])


@pytest.mark.parametrize(
    ("mode", "low", "high"), [("random", 0.94, 1.06), ("uniform_random", 0.94 / 3, 1.06 / 3)]
)
def test_random_gates_follow_the_seed(
    models_dir: Path, tmp_path: Path, mode: str, low: float, high: float
) -> None:
    experts = experts_of(*[models_dir / "expert-a", models_dir / "expert-b"] * 4)
    seven: dict[str, Any] = {"edgemerge": {"seed": 7}, "gate_mode": mode}
    first = make(tmp_path, models_dir / "base", experts, **seven)
    raw, gates = first.read_bytes(), gates_of(first)
    assert make(tmp_path, models_dir / "base", experts, threads=2, **seven).read_bytes() == raw
    other = gates_of(make(tmp_path, models_dir / "base", experts, gate_mode=mode))
    scale = 1.0 if mode == "random" else gates.shape[-1]
    for values in (gates, other):
        assert abs(values.mean()) < 0.05
        assert low < (values.astype(np.float64) ** 2).mean() * scale < high
    assert abs(np.corrcoef(gates.ravel(), other.ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(gates[0].ravel(), gates[1].ravel())[0, 1]) < 0.1


def test_experts_may_be_of_several_types_and_scaled(models_dir: Path, tmp_path: Path) -> None:
    from edgemerge.recipe.recipe import make_recipe

    paths = [models_dir / "expert-a", tmp_path / "b.gguf"]
    merge(
        make_recipe("passthrough", [(str(models_dir / "expert-b"), None)], out_type="Q8_0"),
        paths[1],
    )
    experts = experts_of(*paths)
    experts[1]["residual_scale"] = 0.5
    made = load_gguf(make(tmp_path, paths[0], experts))
    models = load_hub(paths[0] / "model.safetensors"), load_gguf(paths[1])
    for name in WEIGHTS:
        stack = made[f"blk.1.{name}_exps.weight"]
        np.testing.assert_array_equal(
            stack[0], models[0][f"blk.1.{name}.weight"].astype(np.float32)
        )
        scale = np.float32(0.5 if name == "ffn_down" else 1)
        np.testing.assert_array_equal(stack[1], models[1][f"blk.1.{name}.weight"] * scale)


def test_the_file_says_what_it_was_made_of_and_verify_checks_it(
    models_dir: Path, tmp_path: Path
) -> None:
    base, a, b = (models_dir / name for name in ("base", "expert-a", "expert-b"))
    made = make(tmp_path, base, experts_of(a, b))
    metadata = open_model(made).metadata()
    assert get_value(metadata, "edgemerge.method") == "mixture"
    assert get_value(metadata, "general.name") == "mixture of expert-a, expert-b"
    recipe = json.loads(str(get_value(metadata, "edgemerge.recipe")))
    assert recipe["mixture"]["base"] == "base"
    assert [one["path"] for one in recipe["mixture"]["experts"]] == ["expert-a", "expert-b"]
    check_inputs(made, [base, a, b])
    with pytest.raises(VerificationError, match="expert-b is missing"):
        check_inputs(made, [base, a])
    (tmp_path / "expert-b").symlink_to(a)
    with pytest.raises(VerificationError, match="its tensors have the checksum"):
        check_inputs(made, [base, a, tmp_path / "expert-b"])


def test_a_plan_lists_the_models_and_needs_no_tensor(models_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixture.yml"
    experts = experts_of(*[models_dir / "expert-a"] * 2)
    document = {"base_model": str(models_dir / "base"), "gate_mode": "random", "experts": experts}
    recipe.write_text(json.dumps(document))
    the_plan = plan(load_recipe(recipe), memory=68 << 20)
    assert the_plan.needed_bytes <= 68 << 20
    stacked = [job for job in the_plan.jobs if "_exps" in job.name]
    assert len(stacked) == 12
    assert all(job.out.shape[0] == 2 for job in stacked)


def test_models_that_do_not_fit_are_refused(models_dir: Path, tmp_path: Path) -> None:
    base = models_dir / "base"
    with pytest.raises(
        MismatchError, match="is a qwen3 model; a mixture is made of dense models of one"
    ):
        make(tmp_path, base, experts_of(base, ARCHITECTURES / "qwen3"))
    with pytest.raises(MismatchError, match=r"tensor 'blk\.0\.ffn_.*has no place in a mixture"):
        make(tmp_path, ARCHITECTURES / "mixtral", experts_of(base, base))
    with pytest.raises(MismatchError, match="experts must have the shapes of the base"):
        make(tmp_path, base, experts_of(base, ARCHITECTURES / "mistral"))


def test_prompts_need_llama_cpp(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemerge.formats.llama_process.find_spec", lambda _: None)
    experts = [
        one | prompts
        for one, prompts in zip(experts_of(*[models_dir / "base"] * 2), PROMPTS, strict=True)
    ]
    with pytest.raises(
        RecipeError, match=r"pip install 'edgemerge\[run\]', or write gate_mode: random"
    ):
        make(tmp_path, models_dir / "base", experts, gate_mode="cheap_embed")
