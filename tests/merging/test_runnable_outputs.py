"""What is written runs: vectors are F32 under every type, and faults of the inputs are mended or told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.llama_rules import find_violations
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.architecture_models import ARCHITECTURES, NAMES
from tests.support.architecture_models import convert as convert_to_f32
from tests.support.open_gguf import OddModel, load_base
from tests.support.tiny_gguf import write_tiny_gguf


def as_f16(data: bytes) -> bytes:
    return np.frombuffer(data, "<f4").astype("<f2").tobytes()


def write_f16(model: OddModel, path: Path) -> Path:
    """All tensors in F16, as a directory of weights has them."""
    model.tensors = {n: (s, "F16", as_f16(data)) for n, (s, _, data) in model.tensors.items()}
    return model.write(path)


def violations(path: Path) -> list[str]:
    model = GgufModel(path)
    found = find_violations(model.metadata(), model.specs(), model.architecture)
    model.close()
    return [str(violation) for violation in found]


def convert(source: Path, target: Path, out_type: str | None = "keep") -> tuple[str, ...]:
    recipe = make_recipe("passthrough", [(str(source), None)], out_type=out_type)
    return merge(recipe, target, threads=1).notes


@pytest.mark.parametrize("name", NAMES)
def test_keep_writes_the_vectors_of_a_family_in_f32(name: str, tmp_path: Path) -> None:
    convert(ARCHITECTURES / name, tmp_path / "hub.gguf")
    assert violations(tmp_path / "hub.gguf") == []
    whole = load_base(convert_to_f32(ARCHITECTURES / name, tmp_path / "f32.gguf"))
    half = write_f16(whole, tmp_path / "f16.gguf")
    assert violations(half)
    convert(half, tmp_path / "kept.gguf")
    assert violations(tmp_path / "kept.gguf") == []
    model = GgufModel(tmp_path / "kept.gguf")
    types = {len(spec.shape): set[str]() for spec in model.specs().values()}
    for spec in model.specs().values():
        types[len(spec.shape)].add(spec.dtype)
    model.close()
    assert types[1] == {"F32"}
    assert "F16" in types[2]


def test_keep_of_a_directory_runs_in_llama_cpp(tmp_path: Path, models_dir: Path) -> None:
    pytest.importorskip("llama_cpp")
    from edgemerge.runtime.engine.messages import Sampling
    from edgemerge.runtime.generate import Session, read_prompt
    from edgemerge.runtime.llama import Model

    convert(models_dir / "base", tmp_path / "kept.gguf")
    with (
        Model(tmp_path / "kept.gguf", n_threads=1) as model,
        Session(model, 64, Sampling(temperature=0.0)) as session,
    ):
        assert list(session.generate(read_prompt(model, "What is"), 2))


def test_convert_mends_a_text_under_two_ids_and_the_file_runs(tmp_path: Path) -> None:
    model = load_base(write_tiny_gguf(tmp_path / "tiny.gguf"))
    texts = model.texts()
    texts[270] = b"er"
    model.set("tokenizer.ggml.tokens", texts, "[str]")
    bad = model.write(tmp_path / "bad.gguf")
    notes = convert(bad, tmp_path / "mended.gguf", None)
    assert any(
        "token 270 is now [PAD270]: llama.cpp wants every text once" in note for note in notes
    )
    assert violations(tmp_path / "mended.gguf") == []
    pytest.importorskip("llama_cpp")
    from edgemerge.runtime.llama import Model

    with pytest.raises(FormatError, match=r"edgemerge convert \S+bad\.gguf -o NEW\.gguf"):
        Model(bad)
    with Model(tmp_path / "mended.gguf", n_threads=1) as loaded:
        assert loaded.n_vocab == len(texts)
        assert loaded.token_text(262) == "er"


def test_a_fault_of_a_gguf_that_cannot_be_mended_is_told(tmp_path: Path) -> None:
    model = load_base(write_tiny_gguf(tmp_path / "tiny.gguf"))
    model.set("llama.rope.dimension_count", 8, "u32")
    notes = convert(model.write(tmp_path / "bad.gguf"), tmp_path / "out.gguf")
    said = "llama.cpp will not run the output as it is: it states llama.rope.dimension_count as 8"
    assert any(note.startswith(said) for note in notes)


def test_no_gguf_is_made_of_a_directory_that_llama_cpp_would_abort_at(tmp_path: Path) -> None:
    from tests.support.architecture_models import copy_model

    folder = copy_model("qwen2", {"max_position_embeddings": 0}, tmp_path)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 0
    with pytest.raises(FormatError, match=r"context_length|max_position_embeddings"):
        convert(folder, tmp_path / "out.gguf", None)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("out_type", ["F16", "keep"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_not_copied(tmp_path: Path, out_type: str, value: float) -> None:
    model = load_base(write_tiny_gguf(tmp_path / "tiny.gguf"))
    shape, _, data = model.tensors["blk.0.ffn_up.weight"]
    values = np.frombuffer(data, "<f4").copy()
    values[777] = value
    model.tensors["blk.0.ffn_up.weight"] = (shape, "F32", values.tobytes())
    bad = write_f16(model, tmp_path / "bad.gguf")
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_up.*holds NaN or infinity at index 777"):
        convert(bad, tmp_path / "out.gguf", out_type)
    assert not (tmp_path / "out.gguf").exists()


def test_a_scale_of_nan_is_not_copied(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    convert(tiny, tmp_path / "q8.gguf", "Q8_0")
    model = load_base(tmp_path / "q8.gguf")
    shape, dtype, data = model.tensors["blk.1.ffn_down.weight"]
    raw = bytearray(data)
    raw[34 * 5 : 34 * 5 + 2] = b"\x00\x7e"
    model.tensors["blk.1.ffn_down.weight"] = (shape, dtype, bytes(raw))
    with pytest.raises(FormatError, match="holds NaN or infinity at index 160"):
        convert(model.write(tmp_path / "bad.gguf"), tmp_path / "out.gguf")
