"""What a report has to be: files from strangers' devices are read whole or refused in a sentence."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import FormatError
from edgemerge.fleet.reported import MAX_BYTES, read_report
from tests.support.reports import make_report, write_report


def test_a_report_is_read(tmp_path: Path) -> None:
    report = read_report(write_report(tmp_path, "ward-a"))
    assert (report.device, report.outcome, report.seconds) == ("ward-a", "promoted", 11.5)
    assert report.time.isoformat() == "2026-03-02T02:15:00+00:00"
    assert report.current is not None
    assert report.current.n_inputs == 1
    assert report.current.scores["disease"].accuracy == 0.82
    assert report.versions == {"cardio": "7", "neuro": "3"}
    assert report.tried is None


def test_keys_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    assert read_report(write_report(tmp_path, "a", battery=0.5)).device == "a"


def changed(path: str, value: Any) -> dict[str, Any]:
    report = copy.deepcopy(make_report("a"))
    *folders, key = path.split("/")
    place = report
    for folder in folders:
        place = place[folder]
    place[key] = value
    return report


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("edgemerge_report", 2, "is a report of version 2"),
        ("edgemerge_report", True, "'edgemerge_report' is not a whole number"),
        ("device", "b", "states that it is of the device 'b'"),
        ("device", ["a"], "'device' is not a text"),
        ("time", "yesterday", "'time' is not a time such as"),
        ("time", "2026-03-02T02:15:00", "'time' is not a time such as"),
        ("time", "0001-01-01T00:00:00+14:00", "'time' is not a time such as"),
        ("outcome", "great", "'outcome' is not one of promoted"),
        ("outcome", {}, "'outcome' is not a text"),
        ("reason", 5, "'reason' is not a text"),
        ("current", [], "'current' is not an object"),
        ("current/id", "x" * 256, "'current', 'id' is not a text of at most 255"),
        ("current/bytes", -1, "'current', 'bytes' is not a whole number"),
        ("current/made_of", {}, "'current', 'made_of' is not a list"),
        ("current/scores", [1], "'current', 'scores' is not an object"),
        ("current/scores/disease", {"right": 3, "n": 2}, "'disease', 'right' is not a whole"),
        ("current/scores/disease", {"right": 0, "n": 0}, "'disease', 'n' is not a number from 1"),
        ("current/scores/disease", {"right": 1.5, "n": 2}, "'disease', 'right' is not a whole"),
        ("current/signed_by", "x" * 256, "'current', 'signed_by' is not a text of words"),
        ("current/signed_by", [], "'current', 'signed_by' is not a text of words"),
        ("tried", "ward-8", "'tried' is not an object"),
        ("seconds", {"merge": float("1e999")}, "Infinity is not a JSON number"),
        ("seconds", {"merge": "8"}, "'seconds' is not an object of seconds"),
        ("bytes_fetched", 1 << 60, "'bytes_fetched' is not a whole number"),
        ("versions", {"cardio": 7}, "'versions', 'cardio' is not a text"),
        ("versions", {"x" * 256: "1"}, "'versions' is not an object with names of at most 255"),
        ("failures", [1], "'failures' is not a list of texts"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, key: str, value: Any, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(changed(key, value)))
    with pytest.raises(FormatError) as caught:
        read_report(path)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", sorted(make_report("a")))
def test_a_key_that_lacks_is_told(tmp_path: Path, key: str) -> None:
    report = make_report("a")
    del report[key]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(report))
    if key in ("current", "tried", "previous"):  # as null
        read_report(path)
        return
    with pytest.raises(FormatError, match=f"'{key}' is not"):
        read_report(path)


def test_texts_are_plain_and_short(tmp_path: Path) -> None:
    failure = "\x1b[2J\u202etxt " + "x" * 5_000
    report = read_report(write_report(tmp_path, "a", failures=[failure] * 100, reason=failure))
    assert len(report.failures) == 64
    assert report.failures[0] == report.reason
    assert report.reason.isprintable()
    assert len(report.reason) == 400


def test_a_model_of_a_thousand_deltas_has_a_report(tmp_path: Path) -> None:
    versions = {f"delta-{i}": "1" for i in range(1000)}
    report = read_report(write_report(tmp_path, "a", versions=versions))
    assert list(report.versions) == list(versions)[:64]


@pytest.mark.parametrize("n", [1, 4, 64, 100])
def test_a_model_may_have_deltas_of_many_publishers(tmp_path: Path, n: int) -> None:
    keys = [f"{i:032x}" for i in range(n)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(changed("current/signed_by", " ".join(keys))))
    model = read_report(path).current
    assert model is not None
    assert model.signed_by == " ".join(keys[:64])


def test_an_input_may_be_a_file_of_any_name(tmp_path: Path) -> None:
    versions = {f"{'x' * 250}.gguf": "1f2e3d4c"}
    assert read_report(write_report(tmp_path, "a", versions=versions)).versions == versions


def test_links_pipes_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    (tmp_path / "folder.json").mkdir()
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for name, said in (
        ("pipe", "no regular file"),
        ("link", "cannot be read"),
        ("folder", "cannot be read"),
        ("large", "has more than 1024 KiB"),
        ("missing", "cannot be read"),
    ):
        with pytest.raises(FormatError, match=said):
            read_report(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"\xff\xfe", b"{", b"[" * 15_000, b"[" * 200_000, b'{"a": NaN}', b"9" * 9000],
)
def test_what_is_no_json_object_is_told(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(FormatError) as caught:
        read_report(path)
    assert str(caught.value).isprintable()
