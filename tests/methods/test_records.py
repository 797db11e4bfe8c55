"""One record is all that a method needs: those that there are say everything, and a new one works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import edgemerge
from edgemerge import budget
from edgemerge.cli import make_app, request
from edgemerge.errors import BudgetError, RecipeError
from edgemerge.merging import precompile
from edgemerge.methods import documentation, table
from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream, model_weights
from edgemerge.methods.method import Described, Method, WorkingMemory, always
from edgemerge.methods.parameters import WEIGHT, Parameter
from edgemerge.methods.table import METHODS, known_parameters
from edgemerge.native import KernelFile
from edgemerge.native.signatures import KERNEL_NAMES
from edgemerge.types import Float32, Recipe
from tests.support.fixtures import unpacked
from tests.support.small_models import load_gguf, stored
from tests.twins import covariance, directions, elements, singular
from tests.twins import methods as twins
from tests.twins.hierarchical import twin as hierarchical_twin
from tests.twins.resmerge import resmerge

INPUTS = unpacked("golden") / "inputs_f32"
TWINS: dict[str, Callable[..., Any]] = dict.fromkeys(twins.METHODS, twins.merge_tensor)
TWINS |= {"hierarchical": hierarchical_twin, "resmerge": resmerge}
TWINS |= directions.TWINS | elements.TWINS | covariance.TWINS | singular.TWINS

# -- the records that there are ------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_record_is_complete(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.source
    assert name in TWINS
    assert method.kernels
    assert set(method.kernels) <= set(KERNEL_NAMES)
    least, most = method.n_models
    assert 1 <= least <= (most or least)
    assert (method.measure is None) == (method.spans_layer is METHODS["linear"].spans_layer)
    for parameter in method.parameters:
        assert parameter.help
        if parameter.default is not None:
            assert parameter.check(parameter.default) == parameter.default


def test_a_parameter_means_the_same_in_every_method() -> None:
    """But for its default, for names that mergekit uses twice, and for alpha, as papers have it."""
    known = known_parameters()
    for method in METHODS.values():
        for parameter in method.parameters:
            (other,) = (p for p in known[parameter.name] if p.help == parameter.help)
            if other.default is not None:
                parameter = parameter.by_default(other.default)
            assert parameter == other or parameter.default is None or other.default is None
    two = {name: {p.of_model for p in meanings} for name, meanings in known.items() if meanings[1:]}
    assert two == {"epsilon": {True, False}, "t": {False}, "alpha": {False}}


def test_every_method_and_parameter_is_in_the_tables() -> None:
    rows = documentation.methods_table().splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == list(METHODS)
    ties = next(row for row in rows if row.startswith("| `ties` "))
    assert ties == (
        "| `ties` | trim by magnitude, elect signs, mean of those that agree | `density` (1.0), "
        "`normalize` (true), `rescale` (false), `lambda` (1.0), `svc` (false), `svc_rank` (16) | 3 |"
    )
    rows = documentation.parameters_table().splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == [
        name for name, meanings in known_parameters().items() for _ in meanings
    ]
    assert [row.split(" | ")[-1] for row in rows if "`epsilon`" in row] == [
        "each model (della, della_linear) |",
        "the merge (ram, ramplus_tl) |",
    ]


def test_help_tells_the_default_alignment_of_every_method() -> None:
    aligned = [method.name for method in METHODS.values() if method.align != "off"]
    assert [METHODS[name].align for name in aligned] == ["hard"]
    help_text = str(request.Align.__metadata__[0].help)  # type: ignore[attr-defined]
    assert f"[default: hard for {aligned[0]}, else off]" in help_text


# -- a new method: one record and its twin -------------------------------------------------------

linear, norms = KernelFile("linear"), KernelFile("norms")


def _blocks(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    """Mean of two task vectors, as large in the L1 norm as `pull` times the smaller of them."""
    sums = stream.group.row_sum((3,))
    rows = stream.take((stream.job.rows_per_block, 3), np.float64).view(np.float64)
    lanes = stream.take((SUM_LANES,), np.float64)
    for block in stream.blocks():
        own = rows[: block.n_rows]
        for k, delta in enumerate((*block.experts, block.experts[0] + block.experts[1])):
            norms.row_norms(delta, block.n_cols, k, lanes, own)
        sums.add(block.number, own)
    first, second, both = sums.total()
    scale = float(stream.job.settings["pull"]) * min(first, second) / both
    weights = model_weights(stream.job).astype(np.float32)
    for block in stream.blocks():
        assert block.base is not None
        linear.add_deltas(weights, np.ones_like(weights), scale, block.experts, block.base)
        yield block, block.base


def _passes(tensor: Described) -> int:
    return 2


def _memory(tensor: Described) -> WorkingMemory:
    return WorkingMemory(per_row=3 * 8)


def _check(tensor: Described) -> None:
    if tensor.settings["pull"] == 0:
        raise RecipeError("pull is 0, which leaves the base", field="pull")


QUIET = Method(
    "quiet_mean",
    "mean of two changes, no larger than the smaller of them",
    "this test",
    parameters=(WEIGHT.by_default(1.0), Parameter("pull", "factor of its norm", 1.0)),
    kernels=("linear.subtract", "norms.row_norms", "gram.add_rows", "linear.add_deltas"),
    blocks=_blocks,
    needs_base=True,
    n_models=(2, 2),
    passes=_passes,
    memory=_memory,
    check=_check,
    takes_deltas=always,
)


def quiet_twin(base: NDArray[np.float64], a: Float32, b: Float32, pull: float) -> Float32:
    first, second = a - base, b - base
    scale = pull * min(np.abs(first).sum(), np.abs(second).sum()) / np.abs(first + second).sum()
    return np.asarray(base + scale * (first + second), np.float32)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that has to be done to add a method."""
    monkeypatch.setitem(table.METHODS, QUIET.name, QUIET)


def recipe(**parameters: float) -> Recipe:
    models = [(str(INPUTS / name), None) for name in ("a", "b")]
    base = str(INPUTS / "base")
    return edgemerge.make_recipe(
        QUIET.name, models, base=base, parameters=parameters, out_type="F32"
    )


@pytest.mark.usefixtures("quiet")
def test_a_new_method_merges_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = edgemerge.merge(recipe(pull=0.7), tmp_path / "out.gguf")
    assert (report.method, report.passes) == ("quiet_mean", 1)  # every tensor stays in memory
    inputs = [load_gguf_of(name, tmp_path) for name in ("base", "a", "b")]
    for name, values in load_gguf(tmp_path / "out.gguf").items():
        base, a, b = (tensors[name] for tensors in inputs)
        wanted = quiet_twin(base.astype(np.float64), a, b, 0.7)
        assert np.abs(values - wanted).max() <= 4e-7 * np.abs(wanted).max(), name
    monkeypatch.setattr(budget, "TARGET_ELEMENTS", 3 * 64)
    edgemerge.merge(recipe(pull=0.7), tmp_path / "blocks.gguf", threads=2)
    assert stored(tmp_path / "blocks.gguf") == stored(tmp_path / "out.gguf")


def load_gguf_of(name: str, folder: Path) -> dict[str, Float32]:
    output = folder / f"{name}.gguf"
    copy = edgemerge.make_recipe("passthrough", [(str(INPUTS / name), None)], out_type="F32")
    edgemerge.merge(copy, output)
    return load_gguf(output)


@pytest.mark.usefixtures("quiet")
def test_a_new_method_is_planned_compiled_and_checked() -> None:
    with pytest.raises(BudgetError):
        edgemerge.plan(recipe(), memory=1 << 20)
    with pytest.raises(RecipeError, match="which leaves the base"):
        edgemerge.plan(recipe(pull=0.0))
    with pytest.raises(RecipeError, match="it must be a number"):
        edgemerge.plan(recipe(pull="far"))  # type: ignore[arg-type]
    kernels = precompile.kernels_of(QUIET.name, ["F32"], ["F32"])
    assert kernels >= set(QUIET.kernels)


@pytest.mark.usefixtures("quiet")
def test_the_command_line_takes_a_new_method(tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    arguments = ["-m", "quiet_mean", "--base", INPUTS / "base", INPUTS / "a", INPUTS / "b"]
    options = ["-P", "pull=0.7", "--type", "F32"]
    for command in (["plan"], ["merge", "-o", output]):
        result = CliRunner().invoke(make_app(), list(map(str, [*command, *arguments, *options])))
        assert result.exit_code == 0, result.output
    edgemerge.merge(recipe(pull=0.7), tmp_path / "same.gguf")
    assert stored(output) == stored(tmp_path / "same.gguf")
    assert "`quiet_mean` | mean of two changes" in documentation.methods_table()


def test_a_method_that_is_not_listed_is_unknown() -> None:
    with pytest.raises(RecipeError, match="unknown merge method 'quiet_mean'"):
        edgemerge.plan(recipe())
