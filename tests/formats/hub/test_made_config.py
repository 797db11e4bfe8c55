"""Configurations of GGUF files that state nonsense: refused in a sentence, whatever it is."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.hub.made_config import make_config
from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.hub.rotary import rotary_runs
from edgemerge.types import Float32, TensorSpec
from tests.support.architecture_models import ARCHITECTURES, NAMES
from tests.support.generated_models import all_facts, make_model

NONSENSE = (
    encode_value(0, "u32"),
    encode_value((1 << 32) - 1, "u32"),
    encode_value(-1, "i32"),
    encode_value(float("nan"), "f32"),
    encode_value(float("inf"), "f32"),
    encode_value("text", "str"),
    encode_value([], "[u32]"),
    encode_value(["text"], "[str]"),
    None,
)


def read_ones(name: str, start: int = 0, stop: int | None = None) -> Float32:
    return np.ones(4, np.float32)


@pytest.mark.parametrize("name", [*NAMES, *all_facts()])
def test_nonsense_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    model = HubModel(ARCHITECTURES / name if name in NAMES else make_model(name, tmp_path))
    rng, metadata, specs = random.Random(name), dict(model.metadata()), model.specs()
    model.close()
    keys = [key for key in metadata if key.startswith(f"{model.architecture}.")]
    for _ in range(60):
        changed = dict(metadata)
        for key in rng.sample(keys, rng.choice((1, 1, 2))):
            value = rng.choice(NONSENSE)
            changed.pop(key)
            if value is not None:
                changed[key] = value
        given = dict(specs)
        if rng.random() < 0.3:
            given["rope_freqs.weight"] = TensorSpec("rope_freqs.weight", (4,), "F32", 16)
        refusal = "model.gguf: … write a GGUF"
        try:
            make_config(Path("model.gguf"), changed, given, read_ones)
        except FormatError as error:
            refusal = str(error)
        assert refusal.startswith("model.gguf: ")
        assert refusal.endswith("write a GGUF")


def test_counts_whose_product_is_none_are_refused(tmp_path: Path) -> None:
    """Fault: a struct.error."""
    model = HubModel(make_model("qwen3_5", tmp_path))
    metadata = dict(model.metadata()) | {
        "qwen35.ssm.state_size": encode_value((1 << 31) - 1, "u32")
    }
    model.close()
    with pytest.raises(FormatError, match=r"makes a size of 1\.29e\+10.* or write a GGUF"):
        make_config(Path("model.gguf"), metadata, model.specs(), read_ones)


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (1, 5), (3, 4), (5, 12)])
def test_runs_of_items_cover_a_range_once(start: int, stop: int) -> None:
    """The rule itself: item 2 i + p of a head of six is stored as item 3 p + i."""
    found: dict[int, int] = {}
    for first, places in rotary_runs(start, stop, 6):
        found |= {start + at: first + n for n, at in enumerate(places)}
    assert found == {
        item: item // 6 * 6 + item % 2 * 3 + item % 6 // 2 for item in range(start, stop)
    }
