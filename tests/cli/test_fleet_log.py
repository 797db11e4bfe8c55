"""`edgemerge fleet log`: what a device did, and whether anybody changed the record of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from edgemerge.site.log import append_event


def run(path: Path) -> Result:
    return CliRunner().invoke(make_app(), ["fleet", "log", str(path)])


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    append_event(path, {"event": "promoted", "id": "a" * 16, "reason": "better on disease"})
    append_event(path, {"event": "watched", "id": "a" * 16, "found": "nothing amiss"})
    append_event(path, {"event": "rolled_back", "id": "a" * 16, "reason": "odd\x1b[2J answers"})
    return path


def test_it_shows_what_was_done_and_why(log: Path) -> None:
    for path in (log, log.parent):
        result = run(path)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert lines[0].endswith(f"Z promoted    {'a' * 16} better on disease")
        assert lines[1].endswith("nothing amiss")
        assert "\x1b" not in lines[2]
        assert lines[3] == f"{log}: no line of 3 was changed, and none taken out before the last"


def test_a_line_that_was_changed_shows(log: Path) -> None:
    log.write_text(log.read_text().replace("better", "worse"))
    result = run(log)
    assert result.exit_code == 1
    assert "line 2 was changed, or lines before it were taken out" in result.stderr
    assert "none taken out" not in result.stdout


def test_a_line_that_was_taken_out_shows(log: Path) -> None:
    first, _, last = log.read_text().splitlines(keepends=True)
    log.write_text(first + last)
    assert run(log).exit_code == 1


def test_a_folder_without_a_log(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "there is no such log" in result.stderr
