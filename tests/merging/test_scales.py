"""NVFP4 weights under a factor: copied with it by convert, merged where all models have the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgemerge
from edgemerge.errors import MismatchError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.quants.codec import CODECS
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Setting, TensorSpec
from tests.support.small_models import load_gguf, stored

Float32 = NDArray[np.float32]

WEIGHT, SCALE = "blk.0.attn_q.weight", "blk.0.attn_q.scale"
REMEDY = "get these models as F16, BF16 or F32, whose weights have no factors"


def write(
    path: Path, seed: int = 0, scale: float | None = 0.25, *, output_scale: float | None = None
) -> Path:
    """Write a GGUF of one NVFP4 matrix and an NVFP4 output, with factors or without."""
    metadata = {
        "general.architecture": encode_value("llama", "str"),
        "llama.block_count": encode_value(1, "u32"),
    }
    stored: dict[str, NDArray[np.uint8]] = {}
    for i, name in enumerate((WEIGHT, "output.weight")):
        x = np.random.default_rng([seed, i]).standard_normal(16 * 256).astype(np.float32)
        stored[name] = np.empty(16 * 256 // 64 * 36, np.uint8)
        CODECS["NVFP4"].encode(x, stored[name], np.empty(0, np.float32))
    specs = [TensorSpec(name, (16, 256), "NVFP4", raw.nbytes) for name, raw in stored.items()]
    for name, factor in ((SCALE, scale), ("output.scale", output_scale)):
        if factor is not None:
            stored[name] = np.array([factor], np.float32).view(np.uint8)
            specs.append(TensorSpec(name, (1,), "F32", 4))
    layout = make_layout(metadata, specs)
    with path.open("wb") as file:
        file.write(layout.header)
        for name, raw in stored.items():
            file.seek(layout.offsets[name])
            file.write(raw.tobytes())
        file.truncate(layout.n_bytes)
    return path


def merge(
    folder: Path,
    method: str,
    *models: Path,
    out_type: str | None = "F32",
    base: Path | None = None,
    **parameters: Setting,
) -> dict[str, Float32]:
    recipe = make_recipe(
        method,
        [(str(path), None) for path in models],
        base=str(base) if base else None,
        parameters=parameters,
        out_type=out_type,
    )
    edgemerge.merge(recipe, folder / "out.gguf", force=True)
    return load_gguf(folder / "out.gguf")


@pytest.mark.parametrize("dtype", ["F32", "Q8_0", None])
def test_convert_leaves_the_factor_beside_its_weights(tmp_path: Path, dtype: str | None) -> None:
    model = write(tmp_path / "a.gguf", scale=0.3)
    before = load_gguf(model)
    after = merge(tmp_path, "passthrough", model, out_type=dtype)
    assert after[SCALE].tolist() == before[SCALE].tolist() == [np.float32(0.3)]
    step = np.abs(before[WEIGHT]).max() / 127 if dtype == "Q8_0" else 0
    assert np.abs(after[WEIGHT] - before[WEIGHT]).max() <= step
    if dtype is None:
        assert stored(tmp_path / "out.gguf") == stored(model)


def test_a_scaled_copy_scales_the_weights_and_not_their_factor_too(tmp_path: Path) -> None:
    model = write(tmp_path / "a.gguf")
    after = merge(tmp_path, "passthrough", model, scale=0.5)
    assert after[SCALE].tolist() == [0.25]
    assert np.array_equal(after[WEIGHT], load_gguf(model)[WEIGHT] * np.float32(0.5))


def test_equal_factors_are_taken_over_whatever_the_weights(tmp_path: Path) -> None:
    models = [write(tmp_path / f"{seed}.gguf", seed) for seed in range(2)]
    after = merge(tmp_path, "linear", *models, weight=0.25, normalize=False)
    assert after[SCALE].tolist() == [0.25]
    left, right = (load_gguf(path)[WEIGHT] for path in models)
    assert np.allclose(after[WEIGHT], (left + right) / 4, atol=1e-6)


def test_different_factors_are_refused(tmp_path: Path) -> None:
    base, other = write(tmp_path / "base.gguf"), write(tmp_path / "b.gguf", 1, 0.5)
    with pytest.raises(MismatchError) as caught:
        merge(tmp_path, "ties", other, base=base, weight=1.0)
    assert str(caught.value) == (
        f"tensor {SCALE!r}, by which llama.cpp multiplies its weights, is not the same in {base} "
        f"and {other}; {REMEDY}"
    )


def test_a_factor_that_one_model_lacks_is_refused(tmp_path: Path) -> None:
    with_one, without = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf", 1, None)
    sentence = f"tensor {SCALE!r} is missing in {without}; {REMEDY}"
    with pytest.raises(MismatchError) as caught:
        merge(tmp_path, "linear", with_one, without, weight=1.0)
    assert str(caught.value) == sentence
    with pytest.raises(MismatchError, match=f"of .*a.gguf is missing in .*b.gguf; {REMEDY}"):
        merge(tmp_path, "linear", without, with_one, weight=1.0)


def test_the_output_keeps_its_type_where_it_has_a_factor(tmp_path: Path) -> None:
    """llama.cpp looks for output.scale beside NVFP4 alone, and refuses a file with a tensor too many."""
    model = write(tmp_path / "a.gguf", output_scale=0.5)
    merge(tmp_path, "passthrough", model, out_type="keep")
    assert stored(tmp_path / "out.gguf") == stored(model)
    with pytest.raises(MismatchError) as caught:
        merge(tmp_path, "passthrough", model, out_type="Q8_0")
    assert str(caught.value) == (
        f"tensor 'output.scale' of {model} is used by llama.cpp only where output.weight is NVFP4; "
        "keep the types (--type keep), or get that model as F16, BF16 or F32"
    )
