from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgemerge.errors import OutputError, RuntimeFailure
from edgemerge.runtime.evaluation.results import Results, ResultsFile, identify
from tests.support.bits import flip_bit
from tests.support.tiny_gguf import write_tiny_gguf

HEADER = {"version": "1", "models": [{"path": "a"}], "limit": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


def write_some(path: Path) -> None:
    with ResultsFile(path, HEADER) as journal:
        assert journal.n_resumed == 0
        journal.add("job", 0, [[-1.5, -2.0], [1, 1], False])
        journal.add("job", 3, [[-0.1, -1 / 3], [1, 2], True])
        journal.flush()


def test_a_journal_is_taken_up(path: Path) -> None:
    write_some(path)
    with ResultsFile(path, HEADER) as journal:
        assert (journal.n_resumed, journal.note) == (2, "")
        assert journal.entries == {
            "job": {0: [[-1.5, -2.0], [1, 1], False], 3: [[-0.1, -1 / 3], [1, 2], True]}
        }
        journal.add("other", 0, 1)
    with ResultsFile(path, HEADER) as journal:
        assert journal.n_resumed == 3


def test_a_torn_last_line_is_lost_alone(path: Path) -> None:
    write_some(path)
    part = path.with_name("out.json.journal")
    whole = part.read_bytes()
    part.write_bytes(whole[:-5])
    with ResultsFile(path, HEADER) as journal:
        assert (journal.n_resumed, journal.note) == (1, "")
        journal.add("job", 3, [[-0.1, -1 / 3], [1, 2], True])
    assert part.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"models": [{"path": "b"}]}, "other models"),
        ({"limit": 3, "version": "2"}, "other version and limit"),
    ],
)
def test_the_journal_of_another_run_is_dropped_by_force_only(
    path: Path, change: dict[str, object], other: str
) -> None:
    write_some(path)
    journal_path = path.with_name("out.json.journal")
    before = journal_path.read_bytes()
    refusal = f"holds 2 results of an unfinished run with {other}: finish it with its own command"
    with pytest.raises(OutputError, match=refusal):
        ResultsFile(path, {**HEADER, **change})
    assert journal_path.read_bytes() == before
    note = f"an earlier run had {other}: starting anew"
    with ResultsFile(path, {**HEADER, **change}, force=True) as journal:
        assert (journal.n_resumed, journal.note, journal.entries) == (0, note, {})
    with ResultsFile(
        path, HEADER
    ) as journal:  # that run had no results yet: there is nothing to lose
        assert journal.note == note


@pytest.mark.parametrize("damage", [b"{\n", b"[1]\n[2]\n", b"\0" * 50 + b"\n", b"5\n", b'"a"\n'])
def test_a_damaged_journal_is_not(path: Path, damage: bytes) -> None:
    write_some(path)
    part = path.with_name("out.json.journal")
    for text in (damage, part.read_bytes() + damage):
        part.write_bytes(text)
        with ResultsFile(path, HEADER) as journal:
            assert (journal.n_resumed, journal.entries) == (0, {})
            assert journal.note == "it is damaged: starting anew"


def test_one_run_at_a_time(path: Path) -> None:
    with (
        ResultsFile(path, HEADER),
        pytest.raises(OutputError, match="another evaluation is writing it"),
    ):
        ResultsFile(path, HEADER)


def test_publishing_leaves_one_file(path: Path) -> None:
    with ResultsFile(path, HEADER) as journal:
        journal.publish({"acc": 0.5})
    assert json.loads(path.read_text()) == {"acc": 0.5}
    assert os.listdir(path.parent) == ["out.json"]


def test_a_failure_leaves_the_journal(path: Path) -> None:
    write_some(path)
    with ResultsFile(path, HEADER) as journal:
        path.mkdir()
        with pytest.raises(OutputError, match="could not be finished"):
            journal.publish({})
    path.rmdir()
    assert os.listdir(path.parent) == ["out.json.journal"]


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.with_name("out.json.journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot be written"):
        ResultsFile(path, HEADER)
    assert not (tmp_path / "elsewhere").exists()


def test_memory_writes_nothing(tmp_path: Path) -> None:
    with Results() as results:
        results.add("job", 1, 2)
        results.flush()
        results.publish({})
        assert results.entries == {"job": {1: 2}}
    assert os.listdir(tmp_path) == []


def test_models_are_told_apart(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf")
    first = identify(model)
    assert identify(model) == first
    changed = first["files"][0]["changed_ns"]
    flip_bit(model, 8 * model.stat().st_size - 100)
    os.utime(model, ns=(changed, changed))
    assert identify(model) != first
    with pytest.raises(RuntimeFailure, match="is a folder; make a GGUF of it"):
        identify(tmp_path)
