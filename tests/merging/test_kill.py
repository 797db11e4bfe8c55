"""A merge may die at any moment: run again, it ends with the same bytes, nothing lost, nothing done twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from edgemerge.output.journal import journal_path, read_journal
from tests.support.crashing import KINDS, Case, Crasher, lose_power, make_case, remember

OLD = b"precious"
SIDES = ("before", "half", "after")  # of the call at which the process ends


class Ledger:
    """Kills, and what came of them."""

    def __init__(self) -> None:
        self.kills: Counter[tuple[str, str]] = Counter()
        self.resumed = 0

    def lines(self) -> Iterator[str]:
        for axis, name in enumerate(("kind", "phase")):
            counts: Counter[str] = Counter()
            for key, n in self.kills.items():
                counts[key[axis]] += n
            yield f"{name}: " + ", ".join(f"{key} {n}" for key, n in sorted(counts.items()))
        yield f"{self.kills.total()} kills, {self.resumed} tensors taken over"


def put_old_files(case: Case, finished: Mapping[str, bytes]) -> None:
    for name in finished if case.options.get("force") else ():
        (case.folder / name).write_bytes(OLD)


def check_folder(case: Case, finished: Mapping[str, bytes]) -> None:
    """Whatever stands under a final name is old or new, and never a model of both."""
    found = {name: raw for name, raw in case.outputs().items() if name in finished}
    assert all(raw in (OLD, finished[name]) for name, raw in found.items())
    if case.options.get("force") and "split_bytes" not in case.options:
        assert set(found) == set(finished)  # the old one until the new one
    first = min(finished)
    if found.get(first) == finished[first]:
        assert found == finished


def finish(crasher: Crasher, case: Case, finished: Mapping[str, bytes]) -> int:
    """Run again, unless nothing is left to do; return how many tensors were not made again."""
    if case.outputs() == finished:
        return 0
    earlier = read_journal(journal_path(case.folder / min(finished)))
    is_named = not any(name.endswith(".part") for name in case.outputs())
    answer = crasher.run(case)
    assert "error" not in answer, answer
    assert case.outputs() == finished
    n_noted = 0 if earlier is None else len(earlier.results)
    expected = answer["tensors"] if is_named and n_noted else n_noted
    assert (answer["resumed"], answer["damaged"]) == (expected, 0)
    return expected


def kill_everywhere(
    crasher: Crasher,
    case: Case,
    rng: random.Random,
    n_kills: int,
    *,
    power: bool = False,
) -> Ledger:
    """Kill so often, in every phase in turn, and now and then also the run that goes on."""
    whole = crasher.run(case)
    assert whole["resumed"] == 0
    finished = case.outputs()
    calls: dict[str, list[int]] = {}
    for number, phase in enumerate(whole["phases"], start=1):
        calls.setdefault(phase, []).append(number)
    phases = rng.sample(sorted(calls), len(calls))
    ledger = Ledger()
    while ledger.kills.total() < n_kills:
        case.clear()
        put_old_files(case, finished)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.choice(calls[phases[ledger.kills.total() % len(phases)]])
            before = remember(case) if power else {}
            answer = crasher.run(case, at=at, side=rng.choice(SIDES), records=power)
            if "signal" not in answer:
                break  # a run that goes on has fewer calls
            ledger.kills[case.folder.name, case.phase()] += 1
            if power:
                lose_power(case, before, rng)
            check_folder(case, finished)
        ledger.resumed += finish(crasher, case, finished)
    return ledger


@pytest.mark.parametrize("power", [False, True], ids=["killed", "without power"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_dies_goes_on(
    crasher: Crasher, crash_models: Mapping[str, str], memory_folder: Path, kind: str, power: bool
) -> None:
    case = make_case(kind, memory_folder, crash_models)
    kill_everywhere(crasher, case, random.Random(f"{kind} {power}"), 4, power=power)


@pytest.mark.slow
def test_hundreds_of_merges_that_die_go_on(
    crasher: Crasher, crash_models: Mapping[str, str], memory_folder: Path
) -> None:
    """Prints how many kills there were, by kind of merge and by phase."""
    for power in (False, True):
        total, started = Ledger(), time.monotonic()
        for kind in KINDS:
            case = make_case(kind, memory_folder / str(power), crash_models)
            ledger = kill_everywhere(crasher, case, random.Random(kind), 40, power=power)
            total.kills += ledger.kills
            total.resumed += ledger.resumed
            case.clear()
        print(f"\n{'power lost' if power else 'killed'}, {time.monotonic() - started:.0f} s")
        print(*total.lines(), sep="\n")
        assert total.kills.total() >= 300


def kill_late(command: list[str], seconds: float) -> int:
    """Run a command, kill it after so many seconds; return its exit code."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait()


def test_the_command_may_be_killed_at_any_time(models_dir: Path, tmp_path: Path) -> None:
    """By the clock, not by the call: from the start of Python to the end of the merge."""
    rng = random.Random(0)
    output = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "edgemerge", "merge", "-m", "ties", "-P", "density=0.5"]
    command += ["--base", *(str(models_dir / name) for name in ("base", "expert-a", "expert-b"))]
    command += ["--type", "Q4_K_M", "-o", str(output)]
    started = time.monotonic()
    assert kill_late(command, 60) == 0
    took = time.monotonic() - started
    expected = output.read_bytes()
    for _ in range(3):
        output.unlink()
        kill_late(command, took * rng.uniform(0.3, 1.0))
        if [path.name for path in tmp_path.iterdir()] != ["out.gguf"]:  # not just after the end
            assert kill_late(command, 60) == 0
        assert output.read_bytes() == expected
        assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
