"""Merges of files that hold one tensor of every type, checked value by value and byte by byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgemerge
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.quants.codec import CODECS, row_bytes
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import TensorSpec

Halfway = tuple[list[Path], dict[str, NDArray[np.float32]]]

N_ROWS, N_COLS = 5, 512
LATTICE = {"IQ3_S": "Q3_K", "IQ3_XXS": "Q3_K"}
LATTICE |= dict.fromkeys(("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), "Q2_K")


def name_of(dtype: str) -> str:
    return f"blk.0.{dtype.lower()}.weight"


def write(path: Path, seed: int) -> dict[str, NDArray[np.uint8]]:
    """Write a GGUF with weights in all types; the stored bytes by type."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(N_ROWS * N_COLS).astype(np.float32)
    stored = {}
    for dtype, codec in CODECS.items():
        n_bytes = N_ROWS * row_bytes(dtype, N_COLS)
        stored[dtype] = rng.integers(0, 64, n_bytes, np.uint8)  # of halves only finite ones
        if codec.can_encode:
            codec.encode(values, stored[dtype], np.empty(codec.scratch_len, np.float32))
    specs = [TensorSpec(name_of(t), (N_ROWS, N_COLS), t, raw.nbytes) for t, raw in stored.items()]
    metadata = {
        "general.architecture": encode_value("llama", "str"),
        "llama.block_count": encode_value(1, "u32"),
    }
    layout = make_layout(metadata, specs)
    with path.open("wb") as file:
        file.write(layout.header)
        for dtype, raw in stored.items():
            file.seek(layout.offsets[name_of(dtype)])
            file.write(raw.tobytes())
        file.truncate(layout.n_bytes)
    return stored


def decode(dtype: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    values = np.empty(N_ROWS * N_COLS, np.float32)
    CODECS[dtype].decode(raw, values)
    return values


def merge(out: Path, models: list[Path], out_type: str) -> dict[str, tuple[str, bytes]]:
    """Merge with equal weights; type and stored bytes by the type of the input."""
    recipe = make_recipe("linear", [(str(path), 0.5) for path in models], out_type=out_type)
    edgemerge.merge(recipe, out)
    merged = edgemerge.open_model(out)
    found = {}
    for dtype in CODECS:
        spec = merged.specs()[name_of(dtype)]
        raw = np.empty(spec.nbytes, np.uint8)
        merged.read_rows(spec.name, 0, N_ROWS, raw)
        found[dtype] = (spec.dtype, raw.tobytes())
    return found


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Halfway:
    """Two such files, and what lies halfway between them."""
    folder = tmp_path_factory.mktemp("types")
    paths = [folder / "a.gguf", folder / "b.gguf"]
    left, right = (write(path, seed) for seed, path in enumerate(paths))
    half = np.float32(0.5)
    return paths, {t: half * decode(t, left[t]) + half * decode(t, right[t]) for t in CODECS}


def test_every_type_is_read(halfway: Halfway, tmp_path: Path) -> None:
    paths, values = halfway
    found = merge(tmp_path / "out.gguf", paths, "F32")
    for dtype in CODECS:
        assert found[dtype] == ("F32", values[dtype].tobytes()), dtype


def test_every_type_is_kept_but_the_lattice_types(halfway: Halfway, tmp_path: Path) -> None:
    paths, values = halfway
    found = merge(tmp_path / "out.gguf", paths, "keep")
    for dtype in CODECS:
        kept = CODECS[LATTICE.get(dtype, dtype)]
        raw = np.empty(N_ROWS * row_bytes(kept.dtype, N_COLS), np.uint8)
        kept.encode(values[dtype], raw, np.empty(kept.scratch_len, np.float32))
        assert found[dtype] == (kept.dtype, raw.tobytes()), dtype
