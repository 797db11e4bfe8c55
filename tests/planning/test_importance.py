"""Conversions by an importance matrix, against llama_model_quantize tensor by tensor."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgemerge.errors import MismatchError
from edgemerge.formats.quants.filetypes import FILE_TYPES, tensor_types
from edgemerge.merging.run import merge, plan
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.types import Recipe
from tests.support import ggml_oracle
from tests.support.imatrix_files import random_sums, write_gguf, write_old
from tests.support.llama_quantize import Model, Quantiser, converted, make_model

MODELS: dict[str, Callable[[], Model]] = {
    "grouped": lambda: make_model(n_layers=9, heads=(32, 8)),
    "tied, 288": lambda: make_model(n_layers=9, n_cols=288, n_ff=576, tied=True),
    "4 experts": lambda: make_model(n_layers=9, n_experts=4),
    "8 experts": lambda: make_model(n_layers=9, n_experts=8, heads=(32, 8)),
}
QUANTISED = [name for name in FILE_TYPES if name not in ("F32", "F16", "BF16")]


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in tensors}


@pytest.mark.llama
@pytest.mark.parametrize("name", MODELS)
def test_mixtures_ask_for_an_importance_matrix(name: str, quantiser: Quantiser) -> None:
    model = MODELS[name]()
    specs = converted(model)
    source = quantiser.write(model, specs)
    weights = {n: s.ravel() for n, s in random_sums(model.shapes).items()}
    for file_type in QUANTISED:
        types = tensor_types(
            file_type, specs, model.metadata(), model.architecture, has_importance=True
        )
        assert types == quantiser.run(source, file_type, importance=weights), file_type


@pytest.mark.llama
@pytest.mark.parametrize("write", [write_old, write_gguf])
@pytest.mark.parametrize("name", MODELS)
def test_files_are_llama_quantizes(
    name: str, write: Callable[..., dict], quantiser: Quantiser, tmp_path: Path
) -> None:
    if ggml_oracle.fuses():
        pytest.skip("this libggml-base fuses a * b + c; build it with -ffp-contract=off")
    model = MODELS[name]()
    source = quantiser.write(model, converted(model))
    sums = random_sums(model.shapes)
    del sums["token_embd.weight"], sums["blk.1.attn_k.weight"]  # quantised without
    weights = write(tmp_path / "imatrix", sums)
    for file_type in ("Q4_K_M", "Q2_K", "IQ4_XS", "Q5_0", "Q4_1"):
        quantiser.run(source, file_type, importance=weights)
        output = tmp_path / f"{file_type}.gguf"
        recipe = make_recipe(
            "passthrough",
            [(str(source), None)],
            out_type=file_type,
            imatrix=str(tmp_path / "imatrix"),
        )
        merge(recipe, output)
        assert stored(output) == stored(quantiser.folder / "out.gguf"), file_type


def write_model(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    model = make_model(n_layers=2)
    source = Quantiser(None, folder).write(model, converted(model))
    return source, random_sums(model.shapes)


def recipe_for(source: Path, imatrix: Path, out_type: str = "Q4_K_M") -> Recipe:
    return make_recipe(
        "passthrough", [(str(source), None)], out_type=out_type, imatrix=str(imatrix)
    )


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_blocks_may_end_anywhere_in_a_stack_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    model = make_model(n_layers=1, n_experts=4)  # two rows each
    source = Quantiser(None, tmp_path).write(model, converted(model))
    write_old(tmp_path / "i.dat", random_sums(model.shapes))
    merge(recipe_for(source, tmp_path / "i.dat"), tmp_path / "whole.gguf")
    monkeypatch.setattr("edgemerge.budget.TARGET_ELEMENTS", rows * 512)
    merge(recipe_for(source, tmp_path / "i.dat"), tmp_path / "cut.gguf")
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_the_output_says_what_guided_it(tmp_path: Path) -> None:
    source, sums = write_model(tmp_path)
    write_gguf(tmp_path / "i.gguf", sums)
    merge(recipe_for(source, tmp_path / "i.gguf"), tmp_path / "o.gguf")
    fields = gguf.GGUFReader(tmp_path / "o.gguf").fields
    values = {key: field.contents() for key, field in fields.items()}
    assert values["quantize.imatrix.file"] == "i.gguf"
    assert values["quantize.imatrix.dataset"] == "wiki.txt"
    assert values["quantize.imatrix.entries_count"] == len(sums)
    assert values["quantize.imatrix.chunks_count"] == 7
    assert values["edgemerge.imatrix_crc32"] == zlib.crc32((tmp_path / "i.gguf").read_bytes())
    assert '"imatrix": "i.gguf"' in values["edgemerge.recipe"]
    merge(make_recipe("passthrough", [(str(tmp_path / "o.gguf"), None)]), tmp_path / "p.gguf")
    assert "quantize.imatrix.file" not in gguf.GGUFReader(tmp_path / "p.gguf").fields


def test_a_recipe_names_it_too(tmp_path: Path) -> None:
    source, sums = write_model(tmp_path)
    write_old(tmp_path / "i.dat", sums)
    path = tmp_path / "r.yml"
    path.write_text(
        f"merge_method: passthrough\nmodels: [{{model: {source}}}]\n"
        "edgemerge: {type: Q4_K_M, imatrix: i.dat}\n"
    )
    assert load_recipe(path).imatrix == (tmp_path / "i.dat").resolve()
    merge(load_recipe(path), tmp_path / "a.gguf")
    merge(recipe_for(source, tmp_path / "i.dat"), tmp_path / "b.gguf")
    assert stored(tmp_path / "a.gguf") == stored(tmp_path / "b.gguf")


def test_a_merge_is_guided_as_a_conversion_is(tmp_path: Path) -> None:
    source, sums = write_model(tmp_path)
    write_old(tmp_path / "i.dat", sums)
    models = [(str(source), None)] * 2
    recipe = make_recipe("linear", models, out_type="Q4_0", imatrix=str(tmp_path / "i.dat"))
    merge(recipe, tmp_path / "merged.gguf")
    merge(recipe_for(source, tmp_path / "i.dat", "Q4_0"), tmp_path / "one.gguf")
    assert stored(tmp_path / "merged.gguf") == stored(tmp_path / "one.gguf")


def test_the_matrix_of_another_model_is_refused(tmp_path: Path) -> None:
    source, sums = write_model(tmp_path)
    sums["token_embd.weight"] = np.ones((1, 5), np.float32)  # llama-quantize lets this pass
    write_old(tmp_path / "i.dat", sums)
    notes = plan(recipe_for(source, tmp_path / "i.dat")).notes
    assert "i.dat has no importances for 1 tensor, quantised without: token_embd.weight" in notes
    sums["blk.0.ffn_down.weight"] = np.ones((1, 5), np.float32)
    write_old(tmp_path / "i.dat", sums)
    with pytest.raises(MismatchError, match=r"has 5 importances for 'blk\.0\.ffn_down\.weight'"):
        plan(recipe_for(source, tmp_path / "i.dat"))
    assert not any(
        job.is_weighted for job in plan(recipe_for(source, tmp_path / "i.dat", "Q8_0")).jobs
    )
