"""Adapters are combined as peft's add_weighted_adapter does."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.errors import BudgetError, EdgemergeError
from edgemerge.formats import open_model
from edgemerge.formats.adapters.config import ADAPTER_CONFIG
from edgemerge.merging.combination import COMBINATIONS, combine
from edgemerge.merging.elections import Rule, merge_rows
from tests.support.adapters import COMBINED, DENSITY, EXACT, KINDS, SHOWN, project, write_adapter
from tests.support.architecture_models import ARCHITECTURES
from tests.support.hub_order import ANSWERS, as_hub
from tests.support.sources import read_all

Float32 = NDArray[np.float32]

LLAMA = ARCHITECTURES / "llama"
MIB = 1 << 20


@pytest.fixture
def adapters(tmp_path: Path) -> list[tuple[Path, float]]:
    """The two adapters that peft combined, with their weights."""
    return [(write_adapter(KINDS[n], tmp_path / n), weight) for n, weight in COMBINED.items()]


def read(reference: str | Path) -> dict[str, Float32]:
    with closing(open_model(reference)) as source:
        return as_hub("llama", source.architecture, read_all(source))


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
    return config


def density_of(how: str) -> float | None:
    return None if how in ("cat", "linear", "svd") else DENSITY


@pytest.mark.parametrize("how", EXACT)
def test_a_combination_is_peft_s(
    how: str, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    combine(adapters, tmp_path / "both", how=how, density=density_of(how))
    found = read(f"{LLAMA}+{tmp_path / 'both'}")
    for name, number in ANSWERS[how].items():
        assert name.endswith(SHOWN)
        assert project(found[name]) == pytest.approx(number, rel=1e-5, abs=1e-5), name


def test_cat_is_the_sum_of_the_changes(adapters: list[tuple[Path, float]], tmp_path: Path) -> None:
    combine(adapters, tmp_path / "both")
    uses = "+".join(f"{weight!r}*{path}" for path, weight in adapters)
    wanted, found = read(f"{LLAMA}+{uses}"), read(f"{LLAMA}+{tmp_path / 'both'}")
    assert max(float(np.abs(found[name] - x).max()) for name, x in wanted.items()) < 1e-6
    config = read_config(tmp_path / "both")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)


def test_the_layers_of_the_first_do_not_limit_the_others(
    adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    first = adapters[0][0]
    chosen = {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["v"]}
    (first / ADAPTER_CONFIG).write_text(json.dumps(read_config(first) | chosen))
    combine(adapters, tmp_path / "both")
    config = read_config(tmp_path / "both")
    assert [config[key] for key in chosen] == [None, None, None]


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_drops_by_the_seed_alone(
    how: str, adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    outputs = [tmp_path / f"out{i}" for i in range(3)]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        combine(adapters, output, how=how, density=0.5, seed=seed)
    first, again, other = ((o / "adapter_model.safetensors").read_bytes() for o in outputs)
    assert first == again
    assert first != other


def test_dare_keeps_the_mean() -> None:
    ones = np.ones((400, 500), np.float32)
    rule = Rule("dare_linear", 0.25)
    merged = merge_rows(lambda: iter([(0, [ones.copy()])]), rule, [0.5], ones.shape, [7])
    ((_, found),) = merged()
    assert set(np.unique(found)) == {0.0, 2.0}
    assert float(found.mean()) == pytest.approx(0.5, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_pruned_and_elected_as_whole_tensors_are(data: st.DataObject) -> None:
    """However the rows are cut; against NumPy's stable order, with many equal magnitudes."""
    n_rows, n_cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 7))
    count = data.draw(st.integers(1, 3))
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.5, 1e-30])
    size = n_rows * n_cols
    tensors = [
        np.array(data.draw(st.lists(values, min_size=size, max_size=size)), np.float32)
        for _ in range(count)
    ]
    density = data.draw(st.floats(0, 1))
    kind = data.draw(st.sampled_from(["ties", "magnitude_prune"]))
    by_count = data.draw(st.booleans())
    weights = [0.5, -1.0, 2.0][:count]
    height = data.draw(st.integers(1, n_rows))

    def rows():
        for start in range(0, n_rows, height):
            stop = min(n_rows, start + height)
            yield start, [t.reshape(n_rows, n_cols)[start:stop].copy() for t in tensors]

    merged = merge_rows(rows, Rule(kind, density, by_count), weights, (n_rows, n_cols), [0] * count)
    for _ in range(2):  # each pass gives the same
        found = np.concatenate([x for _, x in merged()]).reshape(-1)
        kept = []
        for tensor in tensors:
            order = np.argsort(-np.abs(tensor), kind="stable")[: int(density * size)]
            mask = np.zeros(size, bool)
            mask[order if density < 1 else slice(None)] = True
            kept.append(np.where(mask, tensor, np.float32(0)))
        stack = np.stack(kept)
        scaled = stack * np.array(weights, np.float32)[:, None]
        expected = scaled.sum(axis=0)
        if kind == "ties":
            votes = np.sign(stack).sum(axis=0) if by_count else stack.sum(axis=0)
            agrees = np.sign(stack) == np.where(votes >= 0, 1, -1)
            expected = (scaled * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)
        assert np.allclose(found, expected, rtol=1e-6, atol=0)


def _bare(name: str) -> str:
    return name.replace(".default", "").replace(".ref", "")


def refusal(*arguments: object, **settings: object) -> str:
    with pytest.raises(EdgemergeError) as caught:
        combine(*arguments, **settings)  # type: ignore[arg-type]
    return str(caught.value)


def test_what_cannot_be_combined_is_refused(
    adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "unknown combination 'x'; known are cat, linear" in refusal(adapters, out, how="x")
    assert "ties needs the part of the elements" in refusal(adapters, out, how="ties")
    for how in ("dare_linear", "dare_ties_svd"):
        said = refusal(adapters, out, how=how, density=0.0)
        assert said == f"{how} divides what it keeps by the density, which is 0; give one above 0"
    assert "is a PEFT directory" in refusal(adapters, tmp_path / "out.gguf")
    assert "is no PEFT adapter" in refusal([(LLAMA, 1.0)], out)
    with pytest.raises(BudgetError, match="too small for these adapters"):
        combine(adapters, out, memory=64 * MIB)
    dora = write_adapter(KINDS["dora"], tmp_path / "dora")
    assert "is no plain factor of LoRA" in refusal([*adapters, (dora, 1.0)], out)
    experts = write_adapter(KINDS["experts"], tmp_path / "experts")
    assert "has factors of whole stacks of experts" in refusal([(experts, 1.0)], out)
    fused = write_adapter(KINDS["fused"], tmp_path / "fused")
    combine([*adapters, (fused, 1.0)], tmp_path / "more")  # modules that not all have
    wide = replace(
        KINDS["lora"], shapes={n: (2 * a, b) for n, (a, b) in KINDS["lora"].shapes.items()}
    )
    wider = write_adapter(wide, tmp_path / "wide")
    assert "has no A that fits its B" in refusal([(wider, 1.0)], out)
    # Fault: the last adapter of a file counted.
    names = [n.replace(".weight", f".{a}.weight") for n in wide.shapes for a in ("default", "ref")]
    several = replace(KINDS["lora"], shapes={n: KINDS["lora"].shapes[_bare(n)] for n in names})
    both = write_adapter(several, tmp_path / "several")
    assert "is of a second adapter in the file; save each" in refusal([(both, 1.0)], out)
    other = write_adapter(KINDS["patterns"], tmp_path / "patterns")
    assert "the adapters have different ranks in " in refusal(
        [*adapters, (other, 1.0)], out, how="linear"
    )
    assert not out.exists()


def test_changes_that_float32_cannot_hold_are_refused(
    adapters: list[tuple[Path, float]], tmp_path: Path
) -> None:
    """Fault: LAPACK got infinity, and a traceback ended the command."""
    out, folder = tmp_path / "out", adapters[1][0]
    for how in ("svd", "ties_svd", "dare_ties_svd"):
        density = density_of(how)
        heavy = [(path, 1e38) for path, _ in adapters]
        assert "give smaller weights" in refusal(heavy, out, how=how, density=density)
    weights = folder / "adapter_model.safetensors"
    large = {name: values * np.float32(1e25) for name, values in load_file(weights).items()}
    save_file(large, weights)
    for how in ("svd", "ties_svd", "dare_ties_svd"):
        said = refusal(adapters, out, how=how, density=density_of(how))
        assert said.startswith(f"{folder}: tensor ")
        assert "whose product float32 cannot hold; leave this adapter out" in said
    assert not out.exists()


def test_the_command(adapters: list[tuple[Path, float]], tmp_path: Path) -> None:
    arguments = [f"{path}={weight}" for path, weight in adapters]

    def run(*words: str) -> str:
        done = CliRunner().invoke(make_app(["combine"]), ["combine", *arguments, *words])
        return done.output

    assert "14 modules of rank 8" in run("-o", str(tmp_path / "both"))
    assert "exists already" in run("-o", str(tmp_path / "both"), "--how", "linear")
    words = ("--how", "svd", "--rank", "3", "--force", "--json")
    assert json.loads(run("-o", str(tmp_path / "both"), *words))["ranks"] == [3, 3]
    said = run("-o", str(tmp_path / "both"), "--how", "x")
    assert all(how in said for how in COMBINATIONS)
