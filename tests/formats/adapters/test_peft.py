"""A base with a PEFT adapter is what peft's merge_and_unload makes of the two, for every kind of adapter."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.formats import open_model
from edgemerge.formats.architectures import hf_name
from tests.support.adapters import KINDS, project, write_adapter
from tests.support.architecture_models import ARCHITECTURES, convert
from tests.support.places import TESTS
from tests.support.sources import read_all

Float32 = NDArray[np.float32]

ANSWERS: dict[str, dict[str, float]] = json.loads((TESTS / "data" / "adapters.json").read_text())[
    "answers"
]
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
ROTATED = ("llama", "granite4")


def as_hub(base: str, architecture: str, tensors: dict[str, Float32]) -> dict[str, Float32]:
    """The tensors as transformers names and orders them."""
    config = json.loads((ARCHITECTURES / base / "config.json").read_text())
    found = {}
    for gguf, x in tensors.items():
        name = hf_name(architecture, gguf)
        if name is None:  # computed from the configuration
            continue
        module = name.split(".")[-2]
        if base in ROTATED and module in HEADS:
            heads = config[HEADS[module]]
            halves = x.reshape(heads, len(x) // heads // 2, 2, -1)
            x = halves.swapaxes(1, 2).reshape(x.shape)
        if base == "gemma3" and name.endswith("norm.weight"):
            x = x - np.float32(1)
        found[name] = x
    for name in [n for n in found if n.endswith("gate_proj.weight")]:
        front = name.removesuffix("gate_proj.weight")
        both = np.concatenate([found[name], found[f"{front}up_proj.weight"]], axis=-2)
        found[f"{front}gate_up_proj"] = both
        found[f"{front.replace('.mlp.', '.shared_mlp.')}input_linear.weight"] = both
        down = found[f"{front}down_proj.weight"]
        found[f"{front}down_proj"] = down
        found[f"{front.replace('.mlp.', '.shared_mlp.')}output_linear.weight"] = down
    if "lm_head.weight" not in found:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_as_peft_does(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind]
    base = ARCHITECTURES / made.base
    adapter = write_adapter(made, tmp_path / "adapter")
    with closing(open_model(base)) as source:
        before = as_hub(made.base, source.architecture, read_all(source))
    with closing(open_model(f"{base}+{adapter}")) as source:
        after = as_hub(made.base, source.architecture, read_all(source))
    expected = ANSWERS[made.expected or kind]
    changed = {name for name, x in after.items() if not np.array_equal(x, before[name])}
    assert expected.keys() <= changed
    for name, number in expected.items():
        assert project(after[name]) == pytest.approx(number, rel=2e-6, abs=2e-6), name
    # Other names of the same rows.
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj", "mlp.gate_up_proj"]
    parts += ["experts.", "shared_mlp."]
    assert not {n for n in changed - expected.keys() if not any(part in n for part in parts)}


@pytest.mark.parametrize("kind", ["lora", "dora", "lora_bias", "experts", "embedding", "fused"])
def test_a_gguf_base_gives_the_same(kind: str, tmp_path: Path) -> None:
    base = ARCHITECTURES / KINDS[kind].base
    adapter = write_adapter(KINDS[kind], tmp_path / "adapter")
    whole = convert(base, tmp_path / "base.gguf")
    with closing(open_model(f"{base}+{adapter}")) as source:
        expected = read_all(source)
    for step in (1, 3, 7):  # blocks that cut heads and experts
        with closing(open_model(f"{whole}+{adapter}")) as source:
            found = read_all(source, step)
        for name, x in expected.items():
            assert np.array_equal(found[name], x), (name, step)
