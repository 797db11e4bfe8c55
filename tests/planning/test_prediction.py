"""Times that are predicted: counts of a plan times given rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.weighted import WEIGHTED_TYPES
from edgemerge.merging.run import plan
from edgemerge.planning import decompositions, network
from edgemerge.planning.boards import BOARDS, SOURCES
from edgemerge.planning.decompositions import say_costly_ranks
from edgemerge.planning.prediction import Rates, predict
from edgemerge.planning.reference import DECODE, ENCODE, MERGE, MULTIPLY, START, WEIGHTED
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Plan
from tests.support.small_models import write_gguf

N = 512 * 512
QUICK = Rates(
    name="a machine",
    cores=2,
    memory=1 << 30,
    decode=1.0,
    encode=1.0,
    merge=1.0,
    python=1.0,
    copied=1e15,
    hashed=1e15,
    read=1e15,
    written=1e15,
    error=(0.5, 2.0),
)


@pytest.fixture(scope="module")
def the_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two models of F32 to Q8_0, three tensors of 1 MiB and a vector that stays F32."""
    folder, paths = tmp_path_factory.mktemp("models"), []
    names = ("token_embd", "blk.0.ffn_up", "output")
    tensors = {f"{name}.weight": np.ones((512, 512), np.float32) for name in names}
    vector = {"output_norm.weight": np.ones(512, np.float32)}
    for name in ("a", "b"):
        paths.append(
            (str(write_gguf(folder / f"{name}.gguf", {**tensors, **vector}, n_layers=1)), None)
        )
    return plan(make_recipe("linear", paths, out_type="Q8_0"), threads=2)


def test_processors_share_what_blocks_take(the_plan: Plan) -> None:
    found = predict(the_plan, QUICK)
    each = 2e3 / DECODE["F32"] + 1e3 / ENCODE["Q8_0"] + 2 * MERGE["linear"]  # ns of one element
    of_vector = 512 * (2e3 / DECODE["F32"] + 1e3 / ENCODE["F32"] + 2 * MERGE["linear"])
    expected = START + (3 * N * each + of_vector) / 1e9 / the_plan.workers
    assert the_plan.workers == 2
    assert found.processor == pytest.approx(expected)
    assert found.seconds == found.processor
    slow = predict(the_plan, replace(QUICK, encode=1e6, hashed=1e3))
    encoding = (3 * N * 1e3 / ENCODE["Q8_0"] + 512 * 1e3 / ENCODE["F32"]) / 1e9 / 2 * (1e6 - 1)
    assert slow.processor - found.processor == pytest.approx(
        encoding + the_plan.written_bytes / 1e3
    )


def test_storage_reads_and_writes(the_plan: Plan) -> None:
    found = predict(the_plan, replace(QUICK, read=1e6, written=1e5))
    expected = the_plan.read_bytes / 1e6 + the_plan.written_bytes / 1e5
    assert found.storage == pytest.approx(expected)
    assert found.seconds == found.storage
    assert found.least == pytest.approx(
        0.5 * the_plan.written_bytes / 1e5
    )  # inputs in the page cache
    assert found.most == pytest.approx(2 * (found.processor + found.storage))
    small = predict(the_plan, replace(QUICK, read=1e6, written=1e5, memory=1 << 20))
    assert small.least == pytest.approx(0.5 * expected)


def test_models_on_other_machines_are_not_read_from_storage(
    the_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a model at an address came at the speed of the local disk."""
    monkeypatch.setattr(network, "is_remote", lambda path: path == the_plan.models[0])
    found = predict(the_plan, replace(QUICK, read=1e6))
    assert found.storage == pytest.approx(the_plan.read_bytes / 2 / 1e6)


def test_an_importance_matrix_takes_longer(the_plan: Plan) -> None:
    (job, *_) = the_plan.jobs
    plain = replace(job, out=replace(job.out, dtype="Q4_K"))
    told = [
        predict(replace(the_plan, jobs=(replace(plain, is_weighted=weighted),)), QUICK).processor
        for weighted in (False, True)
    ]
    encoding = job.out.n_elements / ENCODE["Q4_K"] / 1e6 / the_plan.workers
    assert told[1] - told[0] == pytest.approx(encoding * (WEIGHTED["Q4_K"] - 1))


def write_models(folder: Path, n: int, shape: tuple[int, int]) -> list[str]:
    """Write a base and its experts, of one matrix each; give their paths."""
    paths = []
    for i in range(n):
        rows = np.random.default_rng(i).standard_normal(shape).astype(np.float32)
        paths.append(str(write_gguf(folder / f"{i}.gguf", {"blk.0.ffn_up.weight": rows})))
    return paths


def test_products_of_columns_take_their_number(tmp_path: Path) -> None:
    """Fault: `covariance` was predicted as if each element took a few operations."""
    base, *experts = write_models(tmp_path, 4, (256, 128))

    def seconds(columns: int) -> float:
        given = [(path, None) for path in experts]
        recipe = make_recipe("covariance", given, base=base, parameters={"columns": columns})
        return predict(plan(recipe, threads=1), QUICK).processor

    # of each of three models half of the columns with columns, of two of them rows with columns
    of_rows = 256 * 128 * (3 / 2 + 2) * (128 - 32)
    of_factors = 3 * 128 * (128**2 - 32**2) * (2 + 1 / 6)
    assert seconds(0) == seconds(128)
    assert seconds(0) - seconds(32) == pytest.approx(1e-9 * MULTIPLY * (of_rows + of_factors))


def test_memory_is_read_and_written(the_plan: Plan) -> None:
    found = predict(the_plan, replace(QUICK, copied=1e6))
    n_values = 3 * N + 512
    moved = 3 * the_plan.read_bytes + 5 * the_plan.written_bytes + 4 * (2 * 2 + 2) * n_values
    assert found.memory == pytest.approx(moved / 2e6)


def test_many_singular_directions_take_the_cube_of_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a merge of two minutes was predicted to take a second."""
    base, *experts = write_models(tmp_path, 3, (128, 64))

    def planned(rank: int) -> Plan:
        given = [(path, None) for path in experts]
        recipe = make_recipe("tsv", given, base=base, parameters={"rank": rank})
        return plan(recipe, threads=1)

    few, many = planned(8), planned(64)
    assert list(say_costly_ranks(many)) == []
    monkeypatch.setattr(decompositions, "DECOMPOSE", 1e6)
    found = [predict(one, QUICK).processor for one in (few, many)]
    # of each expert, and twice of both together
    each = [2 * rank**3 + 2 * (2 * rank) ** 3 for rank in (8, 64)]
    assert found[1] - found[0] == pytest.approx(1e-3 * (each[1] - each[0]), rel=1e-3)
    (said,) = say_costly_ranks(many)
    assert said == (
        "the singular directions of all matrices, up to 128 at once, take about 1 h 18 min of a core of the "
        "reference machine, which grows with the cube of rank"
    )


def test_the_reference_knows_all_types() -> None:
    assert DECODE.keys() == CODECS.keys()
    assert ENCODE.keys() == {name for name, codec in CODECS.items() if codec.can_encode}
    assert WEIGHTED.keys() == WEIGHTED_TYPES


def test_every_board_has_a_source(the_plan: Plan) -> None:
    assert BOARDS.keys() == SOURCES.keys()
    for board in BOARDS.values():
        found = predict(the_plan, board)
        assert found.least < found.seconds < found.most


def test_a_board_bounds_the_budget() -> None:
    assert BOARDS["pi-zero-2w"].budget(None) == BOARDS["pi-zero-2w"].memory
    assert BOARDS["pi5"].budget(None) == 512 << 20
    assert BOARDS["pi5"].budget(1 << 30) == 1 << 30
    assert BOARDS["pi-zero-2w"].budget(2 << 30) == BOARDS["pi-zero-2w"].memory
