"""The same bytes for every budget, thread count, block height and form of the inputs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgemerge
from edgemerge import budget
from edgemerge.budget import ArenaNeed
from edgemerge.errors import BudgetError, FormatError, MismatchError
from edgemerge.planning import memory as planning
from edgemerge.provenance.verification import verify_model
from edgemerge.types import Recipe
from tests.support.fixtures import unpacked
from tests.support.small_models import edit_hub, stored, wide_tensors, write_gguf

INPUTS = unpacked("golden") / "inputs_f32"
MIB = 1 << 20

# Method -> how many experts, parameters, and how often the inputs are read where blocks are small.
METHODS: dict[str, tuple[int, dict[str, Any], int]] = {
    "linear": (2, {}, 1),
    "slerp": (1, {"t": 0.3}, 2),
    "passthrough": (1, {"scale": 0.9}, 1),
    "task_arithmetic": (2, {"lambda": 0.8}, 1),
    "ties": (2, {"density": 0.5}, 3),
    "dare_linear": (2, {"density": 0.4}, 2),
    "dare_ties": (2, {"density": 0.6, "rescale": "expectation"}, 1),
    "della": (2, {"density": 0.6}, 2),
    "della_linear": (2, {"density": 0.6, "epsilon": 0.3, "rescale": "expectation"}, 1),
    "breadcrumbs": (2, {"density": 0.7, "gamma": 0.05, "rescale": True}, 4),
    "breadcrumbs_ties": (2, {"density": 0.4, "gamma": 0.2}, 3),
    "covariance": (2, {"columns": 96, "ridge": 0.2}, 2),
    "lines": (2, {"beta": 0.7}, 1),
    "tsv": (2, {"rank": 4}, 4),
    "iso_c": (2, {}, 4),
    "iso_cts": (2, {}, 6),
    "resmerge": (2, {"rank": 2}, 5),
    "tsv svc": (2, {"svc": True, "rank": 4}, 7),
    "sce svc": (2, {"svc": True, "svc_rank": 3, "select_topk": 0.4}, 7),
    "hierarchical svc": (2, {"svc": True, "svc_rank": 5}, 5),
    "model_stock": (2, {}, 2),
    "nuslerp": (2, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    "multislerp": (2, {}, 2),
    "karcher": (2, {}, 2),
    "sce": (2, {"select_topk": 0.4}, 4),
    "ram": (2, {"epsilon": 0.01}, 1),
    "ramplus_tl": (2, {"epsilon": 0.01}, 2),
    "arcee_fusion": (1, {}, 3),
    "nearswap": (1, {"t": 0.01}, 1),
}
TYPES = ("F32", "F16", "Q8_0", "Q4_K_M")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """File type -> GGUFs of a base and two fine-tunes."""
    folder = tmp_path_factory.mktemp("inputs")
    base = wide_tensors(0)
    tensors = [base, wide_tensors(1, near=base), wide_tensors(2, near=base)]
    made: dict[str, list[Path]] = {kind: [] for kind in TYPES}
    for i, model in enumerate(tensors):
        made["F32"].append(write_gguf(folder / f"{i}-F32.gguf", model))
        for kind in TYPES[1:]:
            made[kind].append(folder / f"{i}-{kind}.gguf")
            recipe = edgemerge.make_recipe(
                "passthrough", [(str(made["F32"][i]), None)], out_type=kind
            )
            edgemerge.merge(recipe, made[kind][i])
    return made


def recipe_of(name: str, models: list[Path], out_type: str | None = None) -> Recipe:
    n_experts, parameters, _ = METHODS[name]
    method = name.split()[0]
    weights = (0.6, 0.3)
    experts: list[tuple[str, float | None]] = [
        (str(models[1 + i]), weights[i]) for i in range(n_experts)
    ]
    base = None if method in ("linear", "passthrough") else str(models[0])
    if method == "passthrough":
        experts = [(path, None) for path, _ in experts]
    return edgemerge.make_recipe(
        method, experts, base=base, parameters=parameters, out_type=out_type, seed=5
    )


@pytest.fixture
def heights(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Set `rows` to cap the height of every block, 0: no cap; and `cached` to cap those that are cached."""
    cap = {"rows": 0, "cached": 1 << 20}
    fitting, caching = budget.rows_in_arena, budget.blocks_in_arena

    def capped(need: ArenaNeed, arena_bytes: int) -> int:
        rows = fitting(need, arena_bytes)
        return min(rows, cap["rows"]) if cap["rows"] else rows

    def cached(need: ArenaNeed, rows: int, arena_bytes: int) -> int:
        return min(caching(need, rows, arena_bytes), cap["cached"])

    monkeypatch.setattr(planning, "rows_in_arena", capped)
    monkeypatch.setattr(planning, "blocks_in_arena", cached)
    return cap


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_block_height_threads_and_budget_do_not_show(
    method: str,
    kind: str,
    inputs: dict[str, list[Path]],
    heights: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(method, inputs[kind])
    output = tmp_path / "merged.gguf"
    first = edgemerge.merge(recipe, output, memory=2048 * MIB, threads=1)
    assert first.passes == 1  # every tensor is cached whole
    assert first.workers == 1
    n_passes = METHODS[method][2]
    read = set()
    for rows, cached, threads, memory in (
        (16, 0, 3, 320 * MIB),
        (5, 0, 2, 2048 * MIB),
        (7, 3, 2, 320 * MIB),
        (3, 5, 1, 320 * MIB),
        (2, 1 << 20, 2, 2048 * MIB),
    ):
        heights["rows"], heights["cached"] = rows, cached
        report = edgemerge.merge(recipe, output, memory=memory, threads=threads, force=True)
        assert report.workers == threads
        assert report.passes == (n_passes if cached < 1 << 20 else 1)
        assert report.sha256 == first.sha256
        read.add(report.read_bytes)
    assert (min(read), len(read) > 2) == (first.read_bytes, n_passes > 1)
    heights["rows"] = 0
    monkeypatch.setattr(budget, "TARGET_ELEMENTS", 3 * 256)
    report = edgemerge.merge(recipe, output, memory=320 * MIB, threads=2, force=True)
    assert report.sha256 == first.sha256


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
@pytest.mark.parametrize("method", METHODS)
def test_several_workers_on_one_tensor_do_not_show(
    method: str,
    kind: str,
    inputs: dict[str, list[Path]],
    heights: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same file, checksums of the inputs included, when all but the vectors are shared."""
    recipe = recipe_of(method, inputs[kind])
    alone = edgemerge.merge(recipe, tmp_path / "alone.gguf", threads=1)
    monkeypatch.setattr(budget, "TARGET_ELEMENTS", 2 * 256)
    monkeypatch.setattr(
        "edgemerge.planning.plan.workers_on", lambda n, _, workers: workers if n > 256 else 1
    )
    for threads, cached in ((2, 0), (3, 2), (5, 1 << 20)):
        heights["cached"] = cached
        plan = edgemerge.plan(recipe, threads=threads)
        assert {job.workers for job in plan.jobs} == {1, threads}
        output = tmp_path / f"{threads}.gguf"
        assert edgemerge.merge(recipe, output, threads=threads).sha256 == alone.sha256


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_tensor_stops_all_who_share_it(
    method: str, damaged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is told, not that somebody stopped; and nobody is left waiting."""
    tensors = wide_tensors(0)
    models = [write_gguf(tmp_path / "0.gguf", tensors)]
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] = tensors[name].copy()
    tensors[name].ravel()[-1] = np.nan
    models.insert(damaged, write_gguf(tmp_path / "1.gguf", tensors))
    monkeypatch.setattr(budget, "TARGET_ELEMENTS", 2 * 256)
    monkeypatch.setattr(
        "edgemerge.planning.plan.workers_on", lambda n, _, workers: workers if n > 256 else 1
    )
    experts = [(str(path), 0.5) for path in models]
    recipe = edgemerge.make_recipe(
        method,
        experts if method == "linear" else experts[1:],
        base=None if method == "linear" else str(models[0]),
        parameters={"density": 0.5} if method == "ties" else {},
    )
    with pytest.raises(FormatError, match=rf"1\.gguf.*{name}.*holds nan"):
        edgemerge.merge(recipe, tmp_path / "out.gguf", threads=3)


def test_a_difference_that_overflows_is_no_damage(tmp_path: Path) -> None:
    """The inputs are read again to see whose fault it is, which leaves no trace in their checksums."""
    tensors = wide_tensors(0)
    name = max(tensors, key=lambda name: tensors[name].size)
    paths = []
    for i, extreme in enumerate((-3e38, 3e38)):
        tensors[name] = tensors[name].copy()
        tensors[name].ravel()[0] = extreme
        paths.append(write_gguf(tmp_path / f"{i}.gguf", tensors))

    def recipe(method: str, **parameters: float) -> Recipe:
        return edgemerge.make_recipe(
            method,
            [(str(paths[1]), 1.0)],
            base=str(paths[0]),
            parameters=parameters,
            out_type="F32",
        )

    output = tmp_path / "out.gguf"
    with pytest.raises(MismatchError, match=f"{name}.* reaches inf"):
        edgemerge.merge(recipe("ties", density=0.5), output)
    checksums = []
    for what in (
        recipe("breadcrumbs", density=0.5, gamma=0.1),
        recipe("linear"),
    ):  # drops the largest
        edgemerge.merge(what, output, force=True)
        checksums.append(verify_model(output).provenance.inputs)
    assert checksums[0][1:] == checksums[1][-1:]


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_one_row(
    method: str, inputs: dict[str, list[Path]], heights: dict[str, int], tmp_path: Path
) -> None:
    recipe = recipe_of(method, inputs["F16"], "Q8_0")
    whole = edgemerge.merge(recipe, tmp_path / "whole.gguf", threads=1)
    heights["rows"] = 1
    assert edgemerge.merge(recipe, tmp_path / "rows.gguf", threads=2).sha256 == whole.sha256


@pytest.mark.parametrize("kind", TYPES)
def test_copies_in_blocks_are_copies(
    kind: str, inputs: dict[str, list[Path]], heights: dict[str, int], tmp_path: Path
) -> None:
    heights["rows"] = 7
    recipe = edgemerge.make_recipe("passthrough", [(str(inputs[kind][0]), None)], out_type="keep")
    edgemerge.merge(recipe, tmp_path / "copy.gguf", threads=2)
    assert stored(tmp_path / "copy.gguf") == stored(inputs[kind][0])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("weight", "normalize"), [(0.3, True), (1.0, False)])
def test_an_average_of_one_model_is_that_model(
    weight: float, normalize: bool, kind: str, inputs: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Quantised values too are copied, not quantised again; and another type is converted to."""
    parameters = {"normalize": normalize}
    models = [(str(inputs[kind][0]), weight)]
    recipe = edgemerge.make_recipe("linear", models, parameters=parameters, out_type="keep")
    edgemerge.merge(recipe, tmp_path / "copy.gguf")
    assert stored(tmp_path / "copy.gguf") == stored(inputs[kind][0])
    half = edgemerge.make_recipe("linear", models, parameters=parameters, out_type="F16")
    copy = edgemerge.make_recipe("passthrough", [(models[0][0], None)], out_type="F16")
    edgemerge.merge(half, tmp_path / "half.gguf")
    edgemerge.merge(copy, tmp_path / "converted.gguf")
    assert stored(tmp_path / "half.gguf") == stored(tmp_path / "converted.gguf")


@settings(max_examples=12)
@given(
    method=st.sampled_from([name for name, row in METHODS.items() if row[0] == 2]),
    seed=st.integers(0, 2**32),
    threads=st.integers(1, 3),
)
def test_uneven_block_heights_do_not_show(
    method: str,
    seed: int,
    threads: int,
    inputs: dict[str, list[Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Another height for every tensor."""
    folder = tmp_path_factory.mktemp("uneven")
    recipe = recipe_of(method, inputs["F32"])
    whole = edgemerge.merge(recipe, folder / "whole.gguf", threads=1)
    draw = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "rows_in_arena", lambda need, _: draw.randint(1, need.n_rows))
        caching = budget.blocks_in_arena
        patch.setattr(
            planning, "blocks_in_arena", lambda *needed: min(draw.randint(0, 3), caching(*needed))
        )
        cut = edgemerge.merge(recipe, folder / "cut.gguf", threads=threads)
    assert cut.sha256 == whole.sha256


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_budget_is_enough(
    method: str,
    kind: str,
    inputs: dict[str, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the byte: all memory that the arithmetic takes was planned for."""
    recipe = recipe_of(method, inputs[kind])
    whole = edgemerge.merge(recipe, tmp_path / "whole.gguf", memory=2048 * MIB, threads=1)
    monkeypatch.setattr(budget, "MIB", 1)  # the unit in which the smallest budget is rounded up
    with pytest.raises(BudgetError) as caught:
        edgemerge.plan(recipe, memory=1)
    least = caught.value.needed
    with pytest.raises(BudgetError):
        edgemerge.plan(recipe, memory=least - 1)
    report = edgemerge.merge(recipe, tmp_path / "least.gguf", memory=least, threads=3)
    assert report.workers == 1
    assert report.sha256 == whole.sha256


# -- the form of the inputs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The golden models in float16, as directories of safetensors and as GGUF."""
    folder = tmp_path_factory.mktemp("forms")
    made: dict[str, list[Path]] = {"safetensors": [], "gguf": []}
    for role in ("base", "a", "b"):
        hub = edit_hub(INPUTS / role, folder / role, lambda _, x: x.astype(np.float16))
        made["safetensors"].append(hub)
        made["gguf"].append(folder / f"{role}.gguf")
        edgemerge.merge(
            edgemerge.make_recipe("passthrough", [(str(hub), None)], out_type="F16"),
            made["gguf"][-1],
        )
    return made


@pytest.mark.parametrize("out_type", ["F16", "Q8_0"])
@pytest.mark.parametrize("method", METHODS)
def test_safetensors_and_gguf_merge_to_the_same_tensors(
    method: str, out_type: str, forms: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Masks and cuts too: rows of q and k are counted in one order, whatever order a file has."""
    hub, converted = forms["safetensors"], forms["gguf"]
    results = []
    for i, models in enumerate((hub, converted, [converted[0], hub[1], converted[2]])):
        output = tmp_path / f"{i}.gguf"
        edgemerge.merge(recipe_of(method, models, out_type), output)
        results.append(stored(output))
    assert {kind for kind, _ in results[0].values()} == {"F32", out_type}
    assert results[0] == results[1] == results[2]


def test_the_seed_shows(inputs: dict[str, list[Path]], tmp_path: Path) -> None:
    """The guard of all of the above: what should change the bytes does."""
    results = set()
    for seed in (0, 1):
        recipe = edgemerge.make_recipe(
            "dare_linear",
            [(str(inputs["F32"][1]), 1.0)],
            base=str(inputs["F32"][0]),
            parameters={"density": 0.5},
            seed=seed,
        )
        output = tmp_path / f"{seed}.gguf"
        edgemerge.merge(recipe, output)
        results.add(str(sorted(stored(output).items())))
    assert len(results) == 2
