"""A base with a PEFT adapter is what peft's merge_and_unload makes of the two, for every kind of adapter."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgemerge.formats import open_model
from tests.support.adapters import KINDS, project, write_adapter
from tests.support.architecture_models import ARCHITECTURES, convert
from tests.support.hub_order import ANSWERS, as_hub
from tests.support.sources import read_all


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
