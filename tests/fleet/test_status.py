"""`edgemerge fleet status`: what is told of a folder of reports, and who needs somebody."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from edgemerge.errors import FormatError
from edgemerge.fleet import status
from edgemerge.fleet.status import FleetStatus, read_status
from tests.support.reports import NOW, make_report, write_report


def read(folder: Path, days: float = 2) -> FleetStatus:
    return read_status(folder, stale_after=days * 86_400, now=NOW)


def needs(folder: Path, **changes: Any) -> tuple[str, ...]:
    write_report(folder, "a", **changes)
    (one,) = read(folder).devices
    return one.needs


def test_a_promotion_and_a_refusal_need_nobody(tmp_path: Path) -> None:
    assert needs(tmp_path) == ()
    assert needs(tmp_path, outcome="unchanged") == ()
    assert needs(tmp_path, outcome="refused", reason="worse on disease") == ()


def test_failures_silence_and_clocks_need_somebody(tmp_path: Path) -> None:
    assert needs(tmp_path, outcome="failed", reason="no room") == ("failed: no room",)
    assert needs(tmp_path, outcome="rolled_back", reason="slow") == ("rolled back: slow",)
    assert needs(tmp_path, failures=["cardio: signature"]) == ("cardio: signature",)
    assert needs(tmp_path, current=None) == ("has no model to serve",)
    assert needs(tmp_path, time="2026-02-27T11:00:00Z") == ("silent for 3 d 01 h",)
    assert needs(tmp_path, time="2026-03-02T12:04:00Z") == ()
    assert needs(tmp_path, time="2026-03-02T13:00:00Z") == ("its clock is ahead by 1 h 00 min",)


@pytest.mark.parametrize(
    ("before", "found"),
    [("promoted", ()), ("refused", ()), ("rolled_back", ("rolled back: odd answers",))],
)
def test_an_update_that_changes_nothing_mends_nothing(
    tmp_path: Path, before: str, found: tuple[str, ...]
) -> None:
    settled = {"outcome": before, "time": "2026-03-01T02:15:00Z", "reason": "odd answers"}
    assert needs(tmp_path, outcome="unchanged", settled=settled) == found
    write_report(tmp_path, "a", outcome="unchanged", settled=settled, time=recent(hours=1))
    assert ("odd answers" in run(tmp_path).stdout) == (before != "promoted")


def test_a_failure_is_told_once(tmp_path: Path) -> None:
    found = needs(tmp_path, outcome="failed", reason="no room", failures=["no room"])
    assert found == ("failed: no room",)
    write_report(tmp_path, "b", outcome="failed", reason="no room")
    assert read(tmp_path).failures() == [("no room", ("a", "b"))]


def test_a_bad_file_is_one_line_of_its_device(tmp_path: Path) -> None:
    write_report(tmp_path, "good")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / ".good.json.part").write_text("{")
    (tmp_path / ".hidden.json").write_text("{")
    (tmp_path / "notes.txt").write_text("hello")
    found = read(tmp_path)
    assert [one.name for one in found.devices] == ["bad", "good"]
    assert found.devices[0].needs[0].startswith("report is not valid JSON")


def test_what_devices_have_in_common_is_counted(tmp_path: Path) -> None:
    for i, (version, right) in enumerate([("7", 60), ("7", 80), ("6", 90)]):
        current = make_report("")["current"] | {"scores": {"disease": {"right": right, "n": 100}}}
        failures = ["cardio: no room", "cardio: no room"][: 2 * (i > 0)]
        write_report(
            tmp_path, f"d{i}", versions={"cardio": version}, current=current, failures=failures
        )
    found = read(tmp_path)
    assert found.versions() == [("cardio", "7", 2), ("cardio", "6", 1)]
    (scores,) = found.scores()
    assert (scores.accuracies, scores.median) == ((0.6, 0.8, 0.9), 0.8)
    assert found.failures() == [("cardio: no room", ("d1", "d2"))]
    assert found.outcomes() == {"promoted": 3}


def test_too_many_reports_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "MAX_REPORTS", 1)
    for name in "ab":
        write_report(tmp_path, name)
    with pytest.raises(FormatError, match="holds 2 reports, more than 1"):
        read(tmp_path)


# -- the command --------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(["fleet"]), ["fleet", "status", *map(str, arguments)])


def recent(**ago: float) -> str:
    return (datetime.now(UTC) - timedelta(**ago)).isoformat()


def test_the_table_has_a_line_for_each_device(tmp_path: Path) -> None:
    write_report(tmp_path, "ward-a", time=recent(hours=3))
    write_report(
        tmp_path, "ward-b", time=recent(hours=4), outcome="refused", reason="worse on disease"
    )
    result = run(tmp_path)
    assert result.exit_code == 0
    lines = [re.split(r"  +", line) for line in result.stdout.splitlines()]
    common = ["ward-7", "cardio 7, neuro 3", "disease 82.0 %, substance 60.0 %"]
    assert lines[1] == ["ward-a", "3 h 00 min ago", "promoted", *common]
    assert lines[2] == ["ward-b", "4 h 00 min ago", "refused", *common, "worse on disease"]
    assert lines[4] == ["2 devices: 1 promoted, 1 refused; none needs somebody"]
    assert lines[5] == ["", "disease: 82.0 %, median 82.0 %"]


def test_the_exit_status_says_that_one_needs_somebody(tmp_path: Path) -> None:
    write_report(tmp_path, "a", time=recent(hours=1))
    write_report(tmp_path, "b", time=recent(hours=30))
    assert run(tmp_path).exit_code == 0
    result = run(tmp_path, "--stale", "1d")
    assert result.exit_code == 3
    assert result.stdout.splitlines()[1].endswith("! silent for 30 h 00 min")
    assert "1 needs somebody (!)" in result.stdout


def test_strangers_steer_no_terminal(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"versions": {"\x1b[31m": "\x9b2J"}, "edgemerge": "\u202e"}
    write_report(tmp_path, "a", failures=["\x1b]0;title\x07"], **changes)
    (tmp_path / "\x1b[2J.json").write_text("{")
    result = run(tmp_path)
    assert result.exit_code == 3
    assert all(c.isprintable() or c == "\n" for c in result.stdout)
    document = run(tmp_path, "--json").stdout
    assert "\\u001b" not in document
    assert "\\u202e" not in document


def test_json_has_all(tmp_path: Path) -> None:
    write_report(tmp_path, "a", time=recent(hours=1), tried=make_report("a")["current"])
    (tmp_path / "b.json").write_text("[]")
    result = run(tmp_path, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 3
    assert document["needs_somebody"] is True
    assert document["scores"][0] == {
        "task": "disease",
        "devices": 1,
        "least": 0.82,
        "median": 0.82,
        "most": 0.82,
    }
    bad, good = document["devices"]
    assert (bad["device"], bad["readable"]) == ("b", False)
    assert good["current"]["scores"]["disease"] == {"right": 410, "n": 500}
    assert good["tried"]["made"] == "2026-03-02T02:14:00+00:00"


def test_the_page_escapes_and_is_well_formed(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    scores = {"<svg onload=x>": {"right": 1, "n": 2}}
    write_report(folder, "a", current=make_report("a")["current"] | {"scores": scores})
    write_report(folder, "b", failures=["<script>alert(1)</script>"])
    page = tmp_path / "fleet.html"
    assert run(folder, "--page", page).exit_code == 3
    text = page.read_text()
    assert "<script" not in text
    assert "<svg onload" not in text
    assert "&lt;script&gt;" in text
    picture = text.partition("<svg")[2].partition("</svg>")[0]
    assert len(ET.fromstring(f"<svg{picture}</svg>").findall("circle")) == 3


def test_a_page_never_replaces_a_report(tmp_path: Path) -> None:
    path = write_report(tmp_path, "a")
    before = path.read_bytes()
    assert run(tmp_path, "--page", path).exit_code == 2
    assert path.read_bytes() == before


def test_an_empty_and_a_missing_folder(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 3  # an alarm must not fall silent with the network folder
    assert result.stdout.startswith(f"{tmp_path}: no report is there")
    assert json.loads(run(tmp_path, "--json").stdout)["needs_somebody"]
    result = run(tmp_path / "none")
    assert result.exit_code == 1
    assert "No such file" in result.stderr


def test_a_thousand_devices_are_read_in_seconds(tmp_path: Path) -> None:
    for i in range(1000):
        write_report(tmp_path, f"d{i:04}", time=recent(hours=i % 24))
    page = tmp_path / "fleet.html"
    result = run(tmp_path, "--page", page)
    assert result.exit_code == 0
    assert (
        len(result.stdout.splitlines()) == 1 + 1000 + 1 + 3
    )  # header, devices, an empty line, summary
    assert page.read_text().count("<circle") == 2000
