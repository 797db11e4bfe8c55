"""`edgemerge update` and `edgemerge rollback`: what they print, and what they leave alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.updates import (
    KnowingExaminer,
    better,
    folder_of,
    update,
    write_device,
    write_site,
)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    return write_device(tmp_path)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgemerge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(device: Path) -> None:
    done = run("update", device, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "ward-3: would merge by task_arithmetic and ask both models"
    assert lines[2].split() == ["base.gguf", "base", "283", "KiB", "yes"]
    assert lines[4] == "questions: 200 of disease, 200 of general"
    assert lines[-2] == "to fetch: 0 bytes"
    assert lines[-1] == f"folder: {device.parent}/site, where no model yet serves"
    assert done.stderr == ""
    assert not (device.parent / "site").exists()
    update(device, KnowingExaminer(better))
    told = json.loads(run("update", device, "--dry-run", "--json").stdout)
    assert (told["does"], told["serves"]) == ("unchanged", folder_of(device).current_id())
    told = json.loads(run("update", device, "--dry-run", "--json", "--again").stdout)
    assert told["does"] == "merges"


def test_a_dry_run_says_what_the_update_would_complain_of(device: Path) -> None:
    write_site(device.parent, reports="reports", serve={"address": "http://127.0.0.1:9"})
    done = run("update", device, "--dry-run")
    assert done.returncode == 0
    notes = done.stderr.splitlines()
    assert (
        notes[0]
        == f"note: {device.parent}/reports: is no folder, so no report will be written; make it"
    )
    assert notes[1].startswith("note: no server answers at http://127.0.0.1:9 (")
    (device.parent / "site").touch()
    done = run("update", device)
    assert (done.returncode, done.stdout.count("\n")) == (1, 2)
    assert "cannot be made (File exists); name a folder" in done.stdout


def test_a_key_that_cannot_be_used_is_reported(device: Path) -> None:
    (device.parent / "key").write_text("two words\n")
    serve = {"address": "http://127.0.0.1:9", "key": "key"}
    write_site(device.parent, reports=".", serve=serve)
    done = run("update", device)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    told = json.loads((device.parent / "ward-3.json").read_text())
    assert told["outcome"] == "failed"
    assert done.stderr == f"edgemerge: {told['reason']}\n"


def test_a_folder_that_cannot_be_looked_into_is_reported(device: Path) -> None:
    write_site(device.parent, reports=".", folder="x" * 300)  # longer than a name may be
    done = run("update", device)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    told = json.loads((device.parent / "ward-3.json").read_text())
    assert (told["outcome"], "File name too long" in told["reason"]) == ("failed", True)


def test_the_units_of_systemd(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "ward")  # root has no such service
    write_site(device.parent, reports="reports of all")
    done = run("update", device, "--systemd")
    service, _, timer = done.stdout.partition("\n# /etc/systemd/system/edgemerge-update.timer\n")
    assert f"-P -m edgemerge update {device}\n" in service
    assert f'ReadWritePaths={device.parent}/site "{device.parent}/reports of all"\n' in service
    assert "\nType=oneshot\n" in service
    assert "\nSystemCallFilter=@system-service\n" in service
    assert not {"[Install]", "UMask=0077", "DynamicUser=yes"} & set(service.splitlines())
    assert "OnCalendar=" in timer
    assert f" {device.parent}/site '{device.parent}/reports of all'\n" in timer
    if shutil.which("systemd-analyze") is None:
        return
    for name, text in (("edgemerge-update.service", service), ("edgemerge-update.timer", timer)):
        (device.parent / name).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(device.parent / "edgemerge-update.timer")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "edgemerge" not in checked.stderr


def test_errors_are_one_sentence(device: Path) -> None:
    (device.parent / "a.gguf").unlink()
    done = run("update", device)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"edgemerge: {device}: experts[0].path: there is no")
    assert done.stderr.count("\n") == 1
    write_site(device.parent, experts=[{"path": "b.gguf"}])
    done = run("rollback", device)
    assert done.returncode == 1
    assert "has no model that serves; run edgemerge update first" in done.stderr
