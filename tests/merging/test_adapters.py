"""Whole merges of models with adapters: through every command, and the same bytes however they are cut."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import edgemerge
from edgemerge import budget
from edgemerge.budget import ArenaNeed
from edgemerge.cli import make_app
from edgemerge.errors import FormatError, OutputError, VerificationError
from edgemerge.formats.adapters import model as adapted
from edgemerge.merging.extraction import extract
from edgemerge.merging.run import plan
from edgemerge.planning import memory as planning
from edgemerge.provenance.inputs import check_inputs
from tests.support.adapters import KINDS, Kind, pair, tensors_of, write_adapter
from tests.support.architecture_models import ARCHITECTURES
from tests.support.small_models import WIDE, load_gguf, stored, wide_tensors, write_gguf

MIB = 1 << 20
LLAMA = ARCHITECTURES / "llama"
MODULES = {"attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}
METHODS = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.8},
    "ties": {"density": 0.5},
    "della": {"density": 0.6},
    "model_stock": {},
    "hierarchical": {},
}


def wide_adapter(folder: Path, seed: int, *, uses_dora: bool) -> Path:
    """An adapter of rank 5 for `wide_tensors`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stem, module in MODULES.items():
        name, rows = f"model.layers.0.{module}", WIDE[f"blk.0.{stem}"]
        shapes |= pair(name, rows, 256, 5)
        if uses_dora:
            shapes[f"base_model.model.{name}.lora_magnitude_vector"] = (rows,)
    config = {"r": 5, "use_dora": uses_dora, "lora_alpha": seed}
    return write_adapter(Kind("wide", config, shapes), folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """File type -> a base, and the base with one adapter and with two."""
    folder = tmp_path_factory.mktemp("adapted")
    first = wide_adapter(folder / "first", 3, uses_dora=False)
    second = wide_adapter(folder / "second", 7, uses_dora=True)
    found = {}
    whole = write_gguf(folder / "F32.gguf", wide_tensors(0))
    for kind in ("F32", "Q8_0", "Q4_K_M"):
        base = folder / f"{kind}.gguf"
        if kind != "F32":
            recipe = edgemerge.make_recipe("passthrough", [(str(whole), None)], out_type=kind)
            edgemerge.merge(recipe, base)
        expert, other = Path(f"{base}+{first}"), Path(f"{base}+0.5*{first}+{second}")
        found[kind] = [base, expert, other]
    return found


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(sorted(METHODS)),
    kind=st.sampled_from(["F32", "Q8_0", "Q4_K_M"]),
    rows=st.integers(1, 70),
    piece=st.integers(1, 40 * 256),
    threads=st.integers(1, 3),
    memory=st.integers(80, 2000),
)
def test_what_the_budget_decides_does_not_show(
    models: dict[str, list[Path]],
    tmp_path_factory: pytest.TempPathFactory,
    method: str,
    kind: str,
    rows: int,
    piece: int,
    threads: int,
    memory: int,
) -> None:
    base, *experts = map(str, models[kind])
    recipe = edgemerge.make_recipe(
        method,
        [(expert, None) for expert in experts],
        base=None if method == "linear" else base,
        parameters=METHODS[method],
    )
    folder = tmp_path_factory.mktemp("same")
    expected = edgemerge.merge(recipe, folder / "merged.gguf", memory=2048 * MIB, threads=1)
    fitting = budget.rows_in_arena

    def capped(need: ArenaNeed, arena_bytes: int) -> int:
        return min(rows, fitting(need, arena_bytes))

    with patch.object(planning, "rows_in_arena", capped), patch.object(adapted, "PIECE", piece):
        needed = plan(recipe, threads=1, memory=2048 * MIB).needed_bytes
        found = edgemerge.merge(
            recipe,
            folder / "merged.gguf",
            memory=max(needed, memory * MIB),
            threads=threads,
            force=True,
        )
    assert found.sha256 == expected.sha256


def test_a_kept_type_is_the_base_s(models: dict[str, list[Path]], tmp_path: Path) -> None:
    for kind, (base, expert, _) in models.items():
        recipe = edgemerge.make_recipe("passthrough", [(str(expert), None)], out_type="keep")
        edgemerge.merge(recipe, tmp_path / f"{kind}.gguf")
        before, after = stored(base), stored(tmp_path / f"{kind}.gguf")
        assert {n: t for n, (t, _) in after.items()} == {n: t for n, (t, _) in before.items()}
        changed = {n for n, pair in after.items() if pair != before[n]}
        assert changed == {f"blk.0.{stem}.weight" for stem in MODULES}


def test_a_merge_of_adapters_is_their_sum(tmp_path: Path) -> None:
    first = write_adapter(KINDS["lora"], tmp_path / "first")
    second = write_adapter(KINDS["rslora"], tmp_path / "second")
    experts: list[tuple[str, float | None]] = [
        (f"{LLAMA}+{first}", 0.5),
        (f"{LLAMA}+{second}", 0.5),
    ]
    recipe = edgemerge.make_recipe("linear", experts, out_type="F32")
    edgemerge.merge(recipe, tmp_path / "merged.gguf")
    base = edgemerge.make_recipe("passthrough", [(str(LLAMA), None)], out_type="F32")
    edgemerge.merge(base, tmp_path / "base.gguf")
    merged, before = load_gguf(tmp_path / "merged.gguf"), load_gguf(tmp_path / "base.gguf")
    one, two = tensors_of(KINDS["lora"]), tensors_of(KINDS["rslora"])
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    change = 1.5 * (one[f"{name}B.weight"] @ one[f"{name}A.weight"])
    change += 3.0 * (two[f"{name}B.weight"] @ two[f"{name}A.weight"])
    expected = before["blk.1.ffn_down.weight"] + np.float32(0.5) * change
    assert np.allclose(merged["blk.1.ffn_down.weight"], expected, rtol=0, atol=1e-6)


def test_the_file_says_which_adapters_it_was_made_of(tmp_path: Path) -> None:
    first = write_adapter(KINDS["lora"], tmp_path / "first")
    second = write_adapter(KINDS["rslora"], tmp_path / "second")
    expert = f"{LLAMA}+0.5*{first}+{second}"
    output = tmp_path / "merged.gguf"
    recipe = edgemerge.make_recipe("linear", [(str(LLAMA), None), (expert, None)])
    assert edgemerge.merge(recipe, output).models == ("llama", "llama+0.5*first+second")
    check_inputs(output, [LLAMA, Path(expert)])
    with pytest.raises(VerificationError, match=r"was made of llama, llama\+0\.5\*first\+second"):
        check_inputs(output, [LLAMA, Path(f"{LLAMA}+{first}+{second}")])
    (second / "adapter_config.json").write_text(
        (second / "adapter_config.json").read_text().replace('"lora_alpha": 6', '"lora_alpha": 7')
    )
    with pytest.raises(VerificationError, match="is not the input of that name"):
        check_inputs(output, [LLAMA, Path(expert)])


def test_a_recipe_of_mergekit_names_adapters(tmp_path: Path) -> None:
    first = write_adapter(KINDS["lora"], tmp_path / "first")
    second = write_adapter(KINDS["rslora"], tmp_path / "second")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {LLAMA}\nmodels:\n"
        f"  - {{model: {LLAMA}+first, parameters: {{weight: 0.5}}}}\n"
        f"  - {{model: {{model: {{path: {LLAMA}}}, lora: {{path: second}}}}, parameters: {{weight: 1}}}}\n"
    )
    found = edgemerge.merge(edgemerge.load_recipe(recipe), tmp_path / "recipe.gguf")
    experts: list[tuple[str, float | None]] = [
        (f"{LLAMA}+{first}", 0.5),
        (f"{LLAMA}+{second}", 1.0),
    ]
    flags = edgemerge.make_recipe("task_arithmetic", experts, base=str(LLAMA))
    edgemerge.merge(flags, tmp_path / "flags.gguf")
    assert stored(tmp_path / "recipe.gguf") == stored(tmp_path / "flags.gguf")
    assert found.models == ("llama", "llama+first", "llama+second")


def test_an_adapter_alone_is_added_to_the_base(tmp_path: Path) -> None:
    first = write_adapter(KINDS["lora"], tmp_path / "first")
    (first / "config.json").write_text((LLAMA / "config.json").read_text())  # as some tools save
    extract(LLAMA, f"{LLAMA}+{first}", tmp_path / "second.gguf", rank=4)
    alone: list[tuple[str, float | None]] = [
        (str(first), 0.5),
        (str(tmp_path / "second.gguf"), None),
    ]
    found = edgemerge.make_recipe("task_arithmetic", alone, base=str(LLAMA))
    assert found.models() == tuple(
        Path(path) for path in (LLAMA, f"{LLAMA}+{first}", f"{LLAMA}+{tmp_path / 'second.gguf'}")
    )
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: ties\nmodels: [{{model: first}}, {{model: second.gguf}}]\nbase_model: {LLAMA}\n"
    )
    assert edgemerge.load_recipe(recipe).models() == found.models()
    edgemerge.merge(found, tmp_path / "merged.gguf")
    with pytest.raises(FormatError, match=r"give it with its base model, as in BASE\+ADAPTER"):
        edgemerge.merge(edgemerge.make_recipe("linear", alone[:1]), tmp_path / "other.gguf")
    with pytest.raises(FormatError, match=r"give it with its base model, as in BASE\+ADAPTER"):
        edgemerge.merge(edgemerge.make_recipe("linear", alone[1:]), tmp_path / "other.gguf")


def test_an_adapter_beside_the_weights_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    write_adapter(KINDS["lora"], folder)
    for path in LLAMA.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with closing(edgemerge.open_model(folder)) as source:
        assert source.notes()[0].startswith(
            "both: a LoRA adapter lies beside the weights and is not"
        )
    with closing(edgemerge.open_model(f"{folder}+{folder}")) as source:
        assert source.specs()["blk.0.attn_q.weight"].dtype == "F32"


def test_an_adapter_is_never_written_over(tmp_path: Path) -> None:
    adapter = write_adapter(KINDS["lora"], tmp_path / "adapter")
    recipe = edgemerge.make_recipe("linear", [(f"{LLAMA}+{adapter}", None)])
    weights = adapter / "adapter_model.safetensors"
    with pytest.raises(OutputError, match="belongs to one of the inputs"):
        edgemerge.merge(recipe, weights, force=True)
    assert weights.is_file()


def test_commands_take_a_model_with_an_adapter(tmp_path: Path) -> None:
    adapter = write_adapter(KINDS["lora"], tmp_path / "adapter")
    expert, output = f"{LLAMA}+{adapter}", str(tmp_path / "out.gguf")
    app = make_app(["inspect", "convert", "verify", "align", "plan"])

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    inspected = json.loads(run("inspect", expert, "--json"))
    types = {tensor["name"]: tensor["type"] for tensor in inspected["tensors"]}
    assert types["blk.0.attn_q.weight"] == "F32"
    assert types["token_embd.weight"] == "BF16"
    run("convert", expert, "-o", output)
    assert "as the given model's" in run("verify", output, "--input", expert)
    assert "llama" in run("align", str(LLAMA), expert)
    assert f"model  {expert}" in run("plan", "-m", "linear", str(LLAMA), expert)
