"""What is extracted of a hybrid has the rows, columns and values of the stored weights."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.errors import MismatchError
from edgemerge.formats import open_model
from edgemerge.merging.extraction import extract
from tests.support.adapters import FRONT, noise
from tests.support.architecture_models import convert
from tests.support.generated_models import WEIGHTS, all_facts, make_model, stored_f32
from tests.support.safetensors_files import read_safetensors, write_safetensors
from tests.support.sources import read_all

Float32 = NDArray[np.float32]

NAMES = [name for name in all_facts() if name != "gpt_oss"]  # whose experts are packed


def tune(name: str, folder: Path) -> tuple[Path, Path, dict[str, Float32], dict[str, Float32]]:
    """Write a base and an expert, each matrix of which changed by one row times one column."""
    base, expert = make_model(name, folder / "base"), make_model(name, folder / "expert")
    before, after = stored_f32(name), stored_f32(name)
    for i, (tensor, x) in enumerate(before.items()):
        is_matrix = x.ndim == 2 and tensor.endswith(".weight")
        if is_matrix and "experts" not in tensor and "altup_" not in tensor:
            after[tensor] = x + noise((len(x), 1), i) @ noise((1, x.shape[1]), 100 + i)
        elif x.ndim == 1 and tensor.endswith(("norm.weight", "A_log", "dt_bias", ".D")):
            after[tensor] = x + noise(x.shape, i)
    write_safetensors(base / WEIGHTS, before)
    write_safetensors(expert / WEIGHTS, after)
    return base, expert, before, after


def check(folder: Path, before: dict[str, Float32], after: dict[str, Float32]) -> None:
    """Compare what PEFT would add to each module with what changed."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {
        name.removeprefix(FRONT): x
        for name, x in read_safetensors(folder / "adapter_model.safetensors").items()
    }
    for tensor, x in after.items():
        module, change = tensor.removesuffix(".weight"), x - before[tensor]
        if not change.any() or (x.ndim == 1 and not module.endswith("norm")):
            continue
        if x.ndim == 1:
            if ".mamba." not in module:  # in GGUF it is a matrix
                assert np.allclose(found.pop(tensor), x, atol=1e-6), tensor
            continue
        if "embed_tokens" in module:
            b = found.pop(f"{module}.lora_embedding_A").T
            a = found.pop(f"{module}.lora_embedding_B").T
        else:
            a, b = (found.pop(f"{module}.lora_{kind}.weight") for kind in "AB")
        assert np.allclose(b @ a * config["lora_alpha"] / a.shape[0], change, atol=1e-5), tensor
    assert not found


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_adapter_has_the_stored_order(name: str, tmp_path: Path) -> None:
    base, expert, before, after = tune(name, tmp_path)
    report = extract(base, expert, tmp_path / "adapter", rank=1)
    if "falcon" in name:  # peft refuses it
        after = {n: before[n] if "mamba.out_proj" in n else x for n, x in after.items()}
    check(tmp_path / "adapter", before, after)
    is_told = any("parts of state spaces: the changes of" in note for note in report.notes)
    assert is_told == any(tensor.endswith("A_log") for tensor in before)
    with closing(open_model(expert)) as source:
        wanted = read_all(source)
    with closing(open_model(f"{base}+{tmp_path / 'adapter'}")) as source:
        found = read_all(source)
    left_out = ("ssm_a", "ssm_d", "ssm_dt.bias") + ("ssm_norm.weight",) * ("qwen" not in name)
    left_out += ("ssm_out.weight",) * ("falcon" in name)
    for tensor, x in wanted.items():
        if not tensor.endswith(left_out):
            assert np.allclose(found[tensor], x, atol=1e-5), tensor


def test_a_gguf_base_gives_the_same_adapter(tmp_path: Path) -> None:
    base, expert, before, after = tune("qwen3_5", tmp_path)
    whole = convert(base, tmp_path / "base.gguf")
    extract(whole, expert, tmp_path / "adapter", rank=1)
    check(tmp_path / "adapter", before, after)


def test_a_gguf_whose_factors_are_lost_is_refused(tmp_path: Path) -> None:
    base, expert, _, _ = tune("falcon_h1", tmp_path)
    whole = convert(base, tmp_path / "base.gguf")
    with pytest.raises(MismatchError, match="no GGUF of falcon-h1 states by which factors"):
        extract(whole, expert, tmp_path / "adapter", rank=1)
    assert not (tmp_path / "adapter").exists()
    extract(whole, expert, tmp_path / "adapter.gguf", rank=1)


def test_a_head_of_its_own_is_no_change_of_the_embedding(tmp_path: Path) -> None:
    base, expert, _, after = tune("falcon_h1_norm", tmp_path)
    head = after["model.embed_tokens.weight"] + 1
    write_safetensors(expert / WEIGHTS, after | {"lm_head.weight": head})
    with pytest.raises(MismatchError, match="is its embedding, and that of"):
        extract(base, expert, tmp_path / "adapter", rank=1)


def test_an_adapter_of_nothing_is_refused(tmp_path: Path) -> None:
    base, expert, before, _ = tune("qwen3_5", tmp_path)
    tensor = next(tensor for tensor in before if tensor.endswith("A_log"))
    write_safetensors(expert / WEIGHTS, before | {tensor: before[tensor] + 1})
    with pytest.raises(MismatchError, match="has a place in PEFT's adapters, such as that of"):
        extract(base, expert, tmp_path / "adapter", rank=1)
    assert not (tmp_path / "adapter").exists()
