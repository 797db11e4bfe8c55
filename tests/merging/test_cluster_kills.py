"""Workers, scheduler and client of a cluster die at random moments: same bytes, and nothing is lost."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.dask_cluster import DaskCluster, dask_cluster, merge_by_client, start_client
from tests.support.tiny_gguf import write_tiny_gguf

N_KILLS = 50
SEED = 19
PAUSE = 0.15  # seconds after each result: a merge takes some seconds, in which others die
SETTINGS = {"piece_elements": 4096, "piece_bytes": 16384, "pause": PAUSE, "patience": 40.0}


@pytest.mark.slow
def test_a_merge_goes_on_whoever_dies(tmp_path: Path) -> None:
    """Prints how many of each were killed, and what the merges took over."""
    rng, kills, resumed, n_merges = random.Random(SEED), Counter[str](), 0, 0
    models = [str(write_tiny_gguf(tmp_path / f"{seed}.gguf", seed=seed)) for seed in range(3)]
    order = {
        "method": "ties",
        "models": models[1:],
        "recipe": {"base": models[0], "parameters": {"weight": 0.5, "density": 0.4}},
        "output": str(tmp_path / "alone.gguf"),
    }
    merge_by_client([order])
    right = (tmp_path / "alone.gguf").read_bytes()
    with dask_cluster(tmp_path, 3) as cluster:
        while kills.total() < N_KILLS:
            out = tmp_path / "out.gguf"
            todo = order | {"output": str(out), "cluster": cluster.address}
            settings = SETTINGS | {"log": str(tmp_path / "log")}
            settings |= {"hides": True} if rng.random() < 0.5 else {}
            while not out.exists():
                with start_client([todo], **settings) as client:
                    kill_some(cluster, client, tmp_path / "log", rng, kills)
                    answer = json.loads(client.communicate(timeout=120)[0] or "{}")
                    assert "error" not in answer, answer
                    resumed += answer.get("resumed", 0)
            assert out.read_bytes() == right
            assert not list(tmp_path.glob("out.gguf.*"))
            out.unlink()
            n_merges += 1
    print(f"{n_merges} merges, kills: {dict(kills)}, {resumed} tensors taken over")
    assert resumed > 0


def kill_some(
    cluster: DaskCluster,
    client: subprocess.Popen[str],
    log: Path,
    rng: random.Random,
    kills: Counter[str],
) -> None:
    """Kill one after the other while a client works, and start each again but the client."""
    log.unlink(missing_ok=True)
    while not log.exists() and client.poll() is None:
        time.sleep(0.01)
    while client.poll() is None:
        time.sleep(rng.uniform(0.0, 1.5))
        who = rng.choice(("worker", "worker", "worker", "scheduler", "client"))
        if client.poll() is not None:
            return
        kills[who] += 1
        if who == "worker":
            cluster.kill(rng.choice(cluster.workers))
            cluster.add_worker()
        elif who == "client":
            client.send_signal(signal.SIGKILL)
            client.wait(10)
        else:
            assert cluster.scheduler is not None
            cluster.kill(cluster.scheduler)
            cluster.start_scheduler()
            time.sleep(rng.uniform(1.0, 3.0))
