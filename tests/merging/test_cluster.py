"""Merges on a Dask cluster have the bytes of merges on one machine, whatever is lost on the way."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edgemerge.formats.gguf.model import GgufModel
from tests.support.dask_cluster import (
    DaskCluster,
    dask_cluster,
    free_port,
    merge_by_client,
    start_client,
)
from tests.support.file_server import serve_folder
from tests.support.tiny_gguf import write_tiny_gguf

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


SMALL = {"piece_elements": 2048, "piece_bytes": 8192}


@pytest.mark.parametrize(
    "patches",
    [{}, SMALL, {"hides": True}, SMALL | {"hides": True}],
    ids=["in place", "cut", "sent back", "cut and sent back"],
)
def test_a_cluster_makes_the_same_bytes(
    models: Path,
    alone: dict[str, bytes],
    cluster: DaskCluster,
    tmp_path: Path,
    patches: dict[str, Any],
) -> None:
    todo = orders(list(CASES), models, tmp_path / "out", cluster.address)
    found = merge_by_client(todo, **patches)
    assert [answer.get("error") for answer in found] == [None] * len(CASES)
    assert contents(tmp_path / "out") == alone
    # A worker that is busy with something else may be late for one merge, but not for all.
    assert f"made by 2 processes of {cluster.address}" in {one["notes"][-1] for one in found}


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


def test_workers_read_models_at_addresses_by_themselves(
    models: Path, alone: dict[str, bytes], cluster: DaskCluster, tmp_path: Path
) -> None:
    with serve_folder(models) as server:
        addresses = [f"{server.url}/{n}.gguf=0.5" for n in (1, 2)]
        words = ["-m", "linear", *addresses, "--type", "Q8_0", "-o", str(tmp_path / "linear.gguf")]
        command = [sys.executable, "-m", "edgemerge", "merge", *words, "--cluster", cluster.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert len(set(server.clients)) > 1
    made, right = read_tensors(tmp_path / "linear.gguf"), alone["linear.gguf"]
    assert made == right[-len(made) :]


def read_tensors(path: Path) -> bytes:
    """Return what follows the header, which names the models."""
    with closing(GgufModel(path)) as model:
        n_bytes = sum(spec.nbytes for spec in model.specs().values())
    return path.read_bytes()[-n_bytes:]


# -- what is lost ------------------------------------------------------------------------------------


def merge_one(
    models: Path, folder: Path, address: str, name: str = "ties", **patches: object
) -> dict[str, Any]:
    (found,) = merge_by_client(orders([name], models, folder, address), **patches)
    return found


def test_a_worker_that_ends_is_no_loss(
    models: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    with dask_cluster(tmp_path, 2) as cluster:
        todo = orders(["ties"], models, tmp_path / "out", cluster.address)
        with start_client(
            todo, hides=True, pause=0.1, log=str(tmp_path / "log"), **SMALL
        ) as client:
            wait_for_results(tmp_path / "log", client)
            cluster.kill(cluster.workers[0])
            out, err = client.communicate(timeout=60)
        assert "error" not in json.loads(out), err
    assert contents(tmp_path / "out") == {"ties.gguf": alone["ties.gguf"]}


def test_without_its_scheduler_a_merge_ends_and_goes_on_later(
    models: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    with dask_cluster(tmp_path, 2) as cluster:
        todo = orders(["ties"], models, tmp_path / "out", cluster.address)
        with start_client(todo, pause=0.1, log=str(tmp_path / "log"), patience=1.0) as client:
            wait_for_results(tmp_path / "log", client)
            assert cluster.scheduler is not None
            cluster.kill(cluster.scheduler)
            answer = json.loads(client.communicate(timeout=60)[0])
        assert answer["error"].startswith(f"the scheduler at {cluster.address} is gone (")
        assert answer["error"].endswith("; start it and its workers again")
        assert "run the same command again to go on after the" in answer["notes"][0]
        cluster.start_scheduler()
        answer = merge_one(models, tmp_path / "out", cluster.address)  # its workers find it again
        assert answer["resumed"] > 0
    assert contents(tmp_path / "out") == {"ties.gguf": alone["ties.gguf"]}


def test_a_merge_goes_on_with_a_scheduler_that_was_restarted(
    models: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    with dask_cluster(tmp_path, 1) as cluster:
        todo = orders(["ties"], models, tmp_path / "out", cluster.address)
        with start_client(todo, pause=0.1, log=str(tmp_path / "log")) as client:
            wait_for_results(tmp_path / "log", client)
            assert cluster.scheduler is not None
            cluster.kill(cluster.scheduler)
            cluster.start_scheduler()
            answer = json.loads(client.communicate(timeout=90)[0])
        assert "error" not in answer
    assert contents(tmp_path / "out") == {"ties.gguf": alone["ties.gguf"]}


def wait_for_results(log: Path, client: subprocess.Popen[str]) -> None:
    """Wait until some tensors are made, and the models are open on all workers."""
    while not log.exists() or log.read_text().count("\n") < 5:
        assert client.poll() is None, client.communicate()
        time.sleep(0.01)


# -- what is refused ---------------------------------------------------------------------------------


def test_a_worker_with_another_version_is_refused(
    models: Path, cluster: DaskCluster, tmp_path: Path
) -> None:
    found = merge_one(models, tmp_path / "out", cluster.address, software={"numba": "0.1"})
    assert found["kind"] == "ClusterError"
    assert re.fullmatch(
        r"the worker at tcp://127\.0\.0\.1:\d+: has numba [\d.]+, where the merge has 0\.1; install the "
        "same there",
        found["error"],
    )
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("other", [False, True], ids=["missing", "another"])
def test_a_model_that_a_worker_does_not_see_is_refused(
    models: Path, cluster: DaskCluster, tmp_path: Path, other: bool
) -> None:
    shutil.copytree(models, tmp_path / "models")
    there = tmp_path / "models/2.gguf"
    shutil.copy(tmp_path / "models/1.gguf", tmp_path / "other")
    swaps = {str(there): str(tmp_path / "other") if other else None}
    found = merge_one(tmp_path / "models", tmp_path / "out", cluster.address, swaps=swaps)
    what = (
        f"is another file there than here; copy {there} to that machine, or let it see this one"
        if other
        else "is not there; put it where all workers see it under this path, or give an address"
    )
    assert re.fullmatch(
        rf"the worker at tcp://\S+: {re.escape(f'{there}: {what}')}", found["error"]
    )


def test_a_copy_of_a_model_is_as_good(
    models: Path, alone: dict[str, bytes], cluster: DaskCluster, tmp_path: Path
) -> None:
    shutil.copytree(models, tmp_path / "models")
    there = tmp_path / "models/2.gguf"
    shutil.copy(there, tmp_path / "copy")
    swaps = {str(there): str(tmp_path / "copy")}
    found = merge_one(tmp_path / "models", tmp_path / "out", cluster.address, "linear", swaps=swaps)
    assert "error" not in found
    made = (tmp_path / "out/linear.gguf").read_bytes()
    assert len(made) == len(alone["linear.gguf"])


def test_a_scheduler_that_is_not_there_is_one_sentence(models: Path, tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    found = merge_one(models, tmp_path / "out", address, connect_seconds=1.0)
    assert found["error"].startswith(f"no Dask scheduler answers at {address} (")


def test_a_scheduler_without_workers_is_one_sentence(models: Path, tmp_path: Path) -> None:
    with dask_cluster(tmp_path, 0) as cluster:
        found = merge_one(models, tmp_path / "out", cluster.address, patience=1.0)
    assert found["error"] == (
        f"no worker is at {cluster.address}; start some with edgemerge worker {cluster.address}"
    )
