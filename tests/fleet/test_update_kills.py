"""Power may go at any step of an update: the device serves a whole model, and ends in the same state."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemerge.fleet.ingredients import FileHashes
from edgemerge.site.log import read_events
from tests.support.update_kills import Killer, kill_server
from tests.support.updates import folder_of, state_of, write_device, write_site

# Name -> the expert, lambda, and what comes of it.
KINDS = {
    "promotes": ("b.gguf", 0.5, "promoted"),
    "refuses": ("a.gguf", 0.4, "refused"),
    "fails": ("b.gguf", 0.5, "rolled_back"),
    "first": ("a.gguf", 0.5, "promoted"),
}


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with kill_server() as server:
        yield server


def prepare(killer: Killer, folder: Path, kind: str) -> Path:
    """Write a device which serves a model, but for the kind `first`, and declare something new."""
    path = write_device(folder / kind)
    if kind == "first":
        return path
    assert killer.run(path)["outcome"] == "promoted"
    expert, scale, _ = KINDS[kind]
    merge = {"method": "task_arithmetic", "parameters": {"lambda": scale}, "type": "Q8_0"}
    return write_site(path.parent, experts=[{"path": expert}], merge=merge)


def kill_often(
    killer: Killer, folder: Path, kind: str, n_kills: int, rng: random.Random
) -> Counter[str]:
    """Kill so often, now and then also the run that goes on; count what stood in `trying.json`."""
    before = prepare(killer, folder, kind)
    start = folder / f"{kind} at first"
    before.parent.rename(start)
    path = folder / kind / "SITE.yml"
    shutil.copytree(start, path.parent, symlinks=True)
    whole = killer.run(path)
    assert whole["outcome"] == KINDS[kind][2], whole
    expected, n_calls = state_of(folder_of(path)), whole["calls"]
    old = folder_of(start / "SITE.yml").current_id()
    kills: Counter[str] = Counter()
    while kills.total() < n_kills:
        shutil.rmtree(path.parent)
        shutil.copytree(start, path.parent, symlinks=True)
        for _ in range(rng.choice((1, 1, 2, 3))):
            answer = killer.run(path, rng.randint(1, n_calls), rng.choice(("before", "after")))
            if "signal" not in answer:
                assert "error" not in answer, answer
                break  # a run that goes on has fewer calls
            site = folder_of(path)
            kills[str((site.trying() or {"step": "none"})["step"])] += 1
            serves = site.current_id()
            assert (serves is not None) >= (old is not None)
            if serves is not None:
                assert FileHashes(None).of(site.current_path).startswith(serves)
        answer = killer.run(path)
        assert "error" not in answer, answer
        assert state_of(folder_of(path)) == expected
        events = list(read_events(folder_of(path).path / "log.jsonl"))
        assert events[-1]["event"] in ("finished", "unchanged")
        ends = [one for one in events if one["event"] == "finished"]
        assert {one["outcome"] for one in ends} <= {"promoted", KINDS[kind][2]}
    return kills


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_dies_goes_on(killer: Killer, memory_folder: Path, kind: str) -> None:
    kill_often(killer, memory_folder, kind, 6, random.Random(kind))


@pytest.mark.slow
def test_hundreds_of_updates_that_die_go_on(killer: Killer, memory_folder: Path) -> None:
    """Prints how many kills there were, by what the update was doing."""
    kills: Counter[str] = Counter()
    started = time.monotonic()
    for kind in KINDS:
        kills += kill_often(killer, memory_folder, kind, 80, random.Random(kind))
    print(f"\n{kills.total()} kills in {time.monotonic() - started:.0f} s: {dict(kills)}")
    assert kills.total() >= 300
