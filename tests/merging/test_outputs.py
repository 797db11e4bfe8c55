"""What each method writes, whole, split and quantised, is read by us, by gguf-py and by llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgemerge.formats.gguf.model import GgufModel
from edgemerge.merging.run import merge
from edgemerge.methods.table import METHODS
from edgemerge.provenance.verification import verify_model
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.llama import Model
from edgemerge.types import Recipe
from tests.runtime.test_llama import last_logits
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

FORMS: dict[str, dict[str, Any]] = {
    "whole": {"out_type": "F16", "split_bytes": None},
    "quantised": {"out_type": "Q8_0", "split_bytes": None},
    "split": {"out_type": "Q4_K_M", "split_bytes": 40_000},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two others."""
    folder = tmp_path_factory.mktemp("models")
    return [str(write_tiny_gguf(folder / f"{seed}.gguf", seed=seed)) for seed in range(3)]


def recipe_of(method: str, models: list[str], out_type: str) -> Recipe:
    """A recipe with as many models as the method takes, and something to prune where it prunes."""
    row = METHODS[method]
    base, *experts = models if row.needs_base else [None, *models[1:]]
    own = {p.name for p in row.parameters}
    parameters = {key: value for key, value in (("density", 0.7), ("t", 0.3)) if key in own}
    experts = experts[: row.n_models[1]]
    return make_recipe(
        method,
        [(x, None) for x in experts if x],
        base=base,
        parameters=parameters,
        out_type=out_type,
    )


def read_ours(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor, by our reader."""
    model = GgufModel(path)
    found = {}
    for name, spec in model.specs().items():
        raw = np.empty(spec.nbytes, np.uint8)
        model.read_rows(name, 0, spec.n_rows, raw)
        found[name] = (spec.dtype, raw.tobytes())
    model.close()
    return found


def read_theirs(path: Path) -> dict[str, tuple[str, bytes]]:
    """The same by gguf-py."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in tensors}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_three_readers_agree(method: str, form: str, models: list[str], tmp_path: Path) -> None:
    out_type, split_bytes = FORMS[form].values()
    recipe = recipe_of(method, models, out_type)
    report = merge(recipe, tmp_path / "out.gguf", threads=1, split_bytes=split_bytes)
    verify_model(report.output).check()
    paths = [file.path for file in report.files] or [report.output]
    assert (len(paths) > 2) == (form == "split")
    ours = read_ours(report.output)
    assert len(ours) == report.tensors
    assert ours == {name: row for path in paths for name, row in read_theirs(path).items()}
    with Model(report.output, n_threads=1) as model:
        assert np.isfinite(last_logits(model)).all()
