"""Merges on a Dask cluster have the bytes of merges on one machine, whatever is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.dask_cluster import DaskCluster, dask_cluster, merge_by_client
from tests.support.fixtures import unpacked
from tests.support.tiny_gguf import write_tiny_gguf

HEADS = unpacked("golden") / "inputs_f32"
# One pass, several passes, sums over layers and aligned heads, several tensors in one of a directory.
CASES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "recipe": {"parameters": {"weight": 0.5}, "out_type": "Q8_0"}},
    "dare": {
        "method": "dare_linear",
        "recipe": {"base": "0.gguf", "parameters": {"weight": 0.5, "density": 0.4}},
    },
    "ties": {
        "method": "ties",
        "recipe": {
            "base": "0.gguf",
            "parameters": {"weight": 0.5, "density": 0.4},
            "out_type": "Q8_0",
        },
    },
    "hierarchical": {"method": "hierarchical", "recipe": {"base": "0.gguf"}},
    "directory": {
        "method": "task_arithmetic",
        "recipe": {"base": "0.gguf"},
        "output": "directory/",
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        write_tiny_gguf(folder / f"{seed}.gguf", seed=seed)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    with dask_cluster(tmp_path_factory.mktemp("cluster"), 2) as found:
        yield found


def orders(
    names: Sequence[str], models: Path, folder: Path, cluster: str | None
) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    return [
        {
            "method": CASES[name]["method"],
            "models": [str(models / "1.gguf"), str(models / "2.gguf")],
            "recipe": {
                key: str(models / value) if key == "base" else value
                for key, value in CASES[name]["recipe"].items()
            },
            "output": f"{folder}/{CASES[name].get('output', f'{name}.gguf')}",
            "cluster": cluster,
        }
        for name in names
    ]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of all cases, made by this machine alone."""
    folder = tmp_path_factory.mktemp("alone")
    merge_by_client(orders(list(CASES), models, folder, None))
    return contents(folder)


@pytest.mark.parametrize("hides", [False, True], ids=["in place", "sent back"])
@pytest.mark.parametrize("piece", [2048, 1 << 23], ids=["cut", "whole"])
def test_a_cluster_makes_the_same_bytes(
    models: Path,
    alone: dict[str, bytes],
    cluster: DaskCluster,
    tmp_path: Path,
    hides: bool,
    piece: int,
) -> None:
    patches = {"piece_elements": piece, **({"hides": True} if hides else {})}
    found = merge_by_client(
        orders(list(CASES), models, tmp_path / "out", cluster.address), **patches
    )
    assert [answer.get("error") for answer in found] == [None] * len(CASES)
    assert contents(tmp_path / "out") == alone
    assert found[0]["notes"][-1] == f"made by 2 workers of {cluster.address}"


@pytest.mark.parametrize(
    "n_processes",
    [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_processes_of_this_machine_make_the_same_bytes(
    models: Path, alone: dict[str, bytes], tmp_path: Path, n_processes: int
) -> None:
    names = ["ties"]
    found = merge_by_client(orders(names, models, tmp_path / "out", f"local:{n_processes}"))
    assert "error" not in found[0], found
    assert contents(tmp_path / "out") == {"ties.gguf": alone["ties.gguf"]}
