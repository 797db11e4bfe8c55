"""Whose the service is that updates a device, and what it may do."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgemerge.errors import RecipeError
from edgemerge.fleet.site_file import read_site
from edgemerge.fleet.timer import make_units
from tests.support.updates import write_site


def be(monkeypatch: pytest.MonkeyPatch, number: int, by_sudo: str | None = None) -> None:
    """Let the process be of that account, perhaps asked for by another one."""
    monkeypatch.setattr(os, "geteuid", lambda: number)
    monkeypatch.delenv("SUDO_USER", raising=False)
    if by_sudo is not None:
        monkeypatch.setenv("SUDO_USER", by_sudo)


def test_the_service_is_the_folders_owners(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: it ran as root, whose home folder is another than that of who wrote SITE.yml."""
    site = read_site(device)
    be(monkeypatch, 54321)
    units = make_units(site)
    assert "\nUser=54321\n" in units
    assert f"\n#   install -d -o 54321 {site.folder}\n" in units
    be(monkeypatch, 0, by_sudo="ward")
    assert "\nUser=ward\n" in make_units(site)
    site.folder.mkdir()
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="owner"))
    units = make_units(site)
    assert "\nUser=owner\n" in units
    assert "install -d" not in units


def test_the_service_is_not_roots(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: root's could not read a SITE.yml in a closed home folder, as it has no capabilities."""
    site = read_site(device)
    be(monkeypatch, 0)
    with pytest.raises(RecipeError, match=f"with install -d -o USER {site.folder}, and print this"):
        make_units(site)
    site.folder.mkdir()
    be(monkeypatch, 0, by_sudo="ward")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="root"))
    with pytest.raises(RecipeError, match=f"with chown -R USER {site.folder}, and print this"):
        make_units(site)


def test_the_home_folder_is_the_service_users(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: by sudo, the service of a user was to write to root's home folder."""
    monkeypatch.setenv("HOME", str(device.parent))
    write_site(device.parent, reports="~/reports")
    be(monkeypatch, 0, by_sudo="ward")
    homes = {"ward": "/home/ward", "owner": f"{device.parent}/"}
    monkeypatch.setattr(pwd, "getpwnam", lambda name: SimpleNamespace(pw_dir=homes[name]))
    with pytest.raises(RecipeError, match=r"another folder for ward, .*; print this as ward, or"):
        make_units(read_site(device))
    be(monkeypatch, 0, by_sudo="nobody-knows")
    with pytest.raises(RecipeError, match="print this as nobody-knows, or write whole paths"):
        make_units(read_site(device))
    be(monkeypatch, 0, by_sudo="owner")
    assert f"\nReadWritePaths={device.parent}/site {device.parent}/reports\n" in make_units(
        read_site(device)
    )
    be(monkeypatch, 0, by_sudo="ward")
    write_site(device.parent, reports="reports")
    assert "\nUser=ward\n" in make_units(read_site(device))


def test_the_service_is_exposed_little(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, 54321)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("the unit's exposure is not measured: there is no systemd-analyze")
    unit = device.parent / "edgemerge-update.service"
    unit.write_text(make_units(read_site(device)).partition("\n# /etc/")[0])
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
