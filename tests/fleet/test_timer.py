"""Whose the service is that updates a device, and what it may do."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

from edgemerge.fleet.site_file import read_site
from edgemerge.fleet.timer import make_units


def test_the_service_is_the_folders_owners(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: it ran as root, whose home folder is another than that of who wrote SITE.yml."""
    site = read_site(device)
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    units = make_units(site)
    assert "\nUser=54321\n" in units
    assert f"\n#   install -d -o 54321 {site.folder}\n" in units
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "\nUser=root\n" in make_units(site)
    assert "as root. Give the folder to another account" in make_units(site)
    monkeypatch.setenv("SUDO_USER", "ward")
    assert "\nUser=ward\n" in make_units(site)
    site.folder.mkdir()
    units = make_units(site)
    assert f"\nUser={pwd.getpwuid(os.getuid()).pw_name}\n" in units
    assert "install -d" not in units


def test_the_service_is_exposed_little(device: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("the unit's exposure is not measured: there is no systemd-analyze")
    unit = device.parent / "edgemerge-update.service"
    unit.write_text(make_units(read_site(device)).partition("\n# /etc/")[0].replace("=root", "=x"))
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )
    if "unrecognized option" in result.stderr:
        pytest.skip("the unit's exposure is not measured: this systemd-analyze is too old")
    exposure = result.stdout.rpartition("service: ")[2].split()[0]
    assert float(exposure) <= 2.5, result.stdout
