"""A merge may die at any moment: run again, it ends with the same bytes, and nothing is lost or done twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgemerge.formats import open_model
from edgemerge.errors import FormatError
from tests.crashing import Case, Crasher, crash_server, lose_power, remember, write_models

OLD = b"precious"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic", "base": "base"},
    "ties": {"method": "ties", "base": "base", "parameters": {"density": 0.5}},
    "della": {"method": "della", "base": "base", "parameters": {"density": 0.5, "epsilon": 0.1}},
    "hierarchical": {"method": "hierarchical", "base": "base"},
    "convert": {"method": "passthrough", "models": ["a"]},
}
TYPES = ("Q8_0", "F16", "Q4_K_M")
KINDS = [*METHODS, "split", "force", "split force"]


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    with crash_server() as server:
        yield server


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def make_case(kind: str, folder: Path, models: Mapping[str, str]) -> Case:
    """Describe a merge; in its folder may be an older output."""
    folder.mkdir()
    given = dict(METHODS.get(kind, METHODS["linear"]))
    if "base" in given:
        given["base"] = models["base"]
    given["models"] = [models[name] for name in given.get("models", ["a", "b"])]
    given["out_type"] = TYPES[len(kind) % len(TYPES)]
    options: dict[str, Any] = {"threads": 2}
    if "split" in kind:
        options["split_bytes"] = 30_000
    if "force" in kind:
        options["force"] = True
    return Case(folder, given, options)


def put_old_files(case: Case, finished: Mapping[str, bytes]) -> None:
    for name in finished if case.options.get("force") else ():
        (case.folder / name).write_bytes(OLD)


class Ledger:
    """Kills and what came of them."""

    def __init__(self) -> None:
        self.kills: Counter[tuple[str, str]] = Counter()
        self.resumed = 0

    def lines(self) -> Iterator[str]:
        for axis, name in enumerate(("kind", "phase")):
            counts = Counter({key: 0 for key in ()})
            for key, n in self.kills.items():
                counts[key[axis]] += n
            yield f"{name}: " + ", ".join(f"{key} {n}" for key, n in sorted(counts.items()))
        yield f"{self.kills.total()} kills, {self.resumed} tensors taken over"


def check_folder(case: Case, finished: Mapping[str, bytes]) -> None:
    """Whatever stands under a final name is old or new, and never a model of both."""
    found = {name: raw for name, raw in case.outputs().items() if name in finished}
    assert all(raw in (OLD, finished[name]) for name, raw in found.items())
    if case.options.get("force") and "split_bytes" not in case.options:
        assert set(found) == set(finished)  # the old one until the new one
    first = min(finished)
    if found.get(first) == finished[first]:
        assert found == finished


def finish(crasher: Crasher, case: Case, finished: Mapping[str, bytes]) -> dict[str, Any]:
    """Run again, unless the run that was killed had nothing left to do."""
    if case.outputs() == finished:
        return {"resumed": 0, "damaged": 0}
    answer = crasher.run(case)
    assert "error" not in answer, answer
    assert case.outputs() == finished
    return answer


def kill_everywhere(
    crasher: Crasher,
    case: Case,
    rng: random.Random,
    n_kills: int,
    ledger: Ledger,
    kind: str,
    *,
    power: bool = False,
) -> None:
    """Kill so often, spread over the phases; now and then the run after it too."""
    whole = crasher.run(case)
    finished = case.outputs()
    by_phase: dict[str, list[int]] = {}
    for number, phase in enumerate(whole["phases"], start=1):
        by_phase.setdefault(phase, []).append(number)
    phases = sorted(by_phase)
    done = 0
    while done < n_kills:
        case.clear()
        put_old_files(case, finished)
        depth = 1 + (rng.random() < 0.25)
        for _ in range(depth):
            at = rng.choice(by_phase[phases[done % len(phases)]])
            side = rng.choice(("before", "half", "after"))
            before = remember(case) if power else {}
            answer = crasher.run(case, at=at, side=side, records=power)
            if "signal" not in answer:
                break  # a resumed run has fewer calls
            ledger.kills[kind, case.phase()] += 1
            done += 1
            if power:
                lose_power(case, before, rng)
            check_folder(case, finished)
        answer = finish(crasher, case, finished)
        ledger.resumed += answer["resumed"]


@pytest.mark.parametrize("power", [False, True], ids=["killed", "without power"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_merge_goes_on(
    crasher: Crasher, models: Mapping[str, str], tmp_path: Path, kind: str, power: bool
) -> None:
    ledger = Ledger()
    case = make_case(kind, tmp_path / "out", models)
    kill_everywhere(crasher, case, random.Random(kind), 4, ledger, kind, power=power)
    print(*ledger.lines(), sep="\n")
