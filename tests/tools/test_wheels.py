"""The lists of wheels that offline installations are checked against, and the script that installs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.list_wheels import requirements

INSTALL = Path(__file__).resolve().parents[2] / "tools" / "install.sh"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
TARGET = f"{os.uname().machine}-{VERSION}"
COMMAND = "import sys\n\n\ndef main():\n    print('0.0.1', sys.argv[1:])\n"


def make_wheel(folder: Path, command: str = COMMAND) -> Path:
    """A wheel of the name that `install.sh` installs, with a command that prints its arguments."""
    path = folder / "edgemerge-0.0.1-py3-none-any.whl"
    info = "edgemerge-0.0.1.dist-info"
    files = {
        "edgemerge.py": command,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: edgemerge\nVersion: 0.0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nedgemerge = edgemerge:main\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder as `tools/wheels` makes it, for this Python."""
    folder = tmp_path / "a folder of wheels"
    folder.mkdir()
    make_wheel(folder)
    (folder / f"{TARGET}.txt").write_text("\n".join(requirements(folder)) + "\n")
    (folder / "install.sh").write_bytes(INSTALL.read_bytes())
    return folder


def install(wheels: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    bin_folder = home / "python"
    bin_folder.mkdir(parents=True, exist_ok=True)
    if not (link := bin_folder / f"python{VERSION}").exists():
        link.symlink_to(getattr(sys, "_base_executable", sys.executable))
    return subprocess.run(
        ["sh", str(wheels / "install.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env={"HOME": str(home), "PATH": f"{bin_folder}:/usr/bin:/bin"},
    )


def test_a_list_has_names_versions_and_hashes(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    other = tmp_path / "Some_Thing.x-2.0-cp311-cp311-manylinux_2_28_aarch64.whl"
    other.write_bytes(b"wheel")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (other, wheel)]
    assert requirements(tmp_path) == [
        f"some-thing.x==2.0 --hash=sha256:{digests[0]}",
        f"edgemerge==0.0.1 --hash=sha256:{digests[1]}",
    ]


def test_install_from_the_folder_alone(wheels: Path, tmp_path: Path) -> None:
    """Then a wheel that was changed is refused elsewhere, and this installation stays as it is."""
    home = tmp_path / "home"
    done = install(wheels, home)
    assert done.returncode == 0, done.stderr
    assert f"for {os.uname().machine} and Python {VERSION}" in done.stdout
    command = home / ".local" / "bin" / "edgemerge"
    assert command.resolve() == home / ".local/share/edgemerge/bin/edgemerge"
    assert subprocess.check_output([command, "a"], text=True) == "0.0.1 ['a']\n"

    # After an upgrade of the system, the environment's Python is gone. The same command makes it anew.
    for link in list((home / ".local/share/edgemerge/bin").glob("python*")):
        link.unlink()
        link.symlink_to("/usr/bin/python3.2")
    done = install(wheels, home, "--into", ".local/share/edgemerge")
    assert done.returncode == 0, done.stderr
    assert subprocess.check_output([command, "a"], text=True) == "0.0.1 ['a']\n"

    with zipfile.ZipFile(wheels / "edgemerge-0.0.1-py3-none-any.whl", "a") as archive:
        archive.writestr("other.py", "")
    done = install(wheels, tmp_path / "other")
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert subprocess.check_output([command, "b"], text=True) == "0.0.1 ['b']\n"


def test_an_update_of_the_same_version(wheels: Path, tmp_path: Path) -> None:
    """Fault: to pip it was installed already, and the old code stayed."""
    home = tmp_path / "home"
    assert install(wheels, home).returncode == 0
    make_wheel(wheels, COMMAND.replace("0.0.1", "newer"))
    (wheels / f"{TARGET}.txt").write_text("\n".join(requirements(wheels)) + "\n")
    done = install(wheels, home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "newer ['--version']"
    assert not list((home / ".local/share/edgemerge").glob("*.txt"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("import sys; sys.maxsize = 2**31 - 1", "is a 32-bit program"),
        ("import platform; platform.libc_ver = lambda: ('musl', '1.2')", "does not use glibc"),
    ],
)
def test_a_python_that_wheels_are_not_for(
    wheels: Path, tmp_path: Path, change: str, reason: str
) -> None:
    """Fault: the name of a 64-bit kernel was taken for that of Python's processor."""
    (tmp_path / "sitecustomize.py").write_text(change)
    python = tmp_path / "home" / "python" / f"python{VERSION}"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = install(wheels, tmp_path / "home")
    assert done.returncode == 1
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "home" / ".local").exists()


def test_what_cannot_be_installed_is_one_sentence(wheels: Path, tmp_path: Path) -> None:
    (wheels / f"{TARGET}.txt").rename(wheels / "riscv64-3.11.txt")
    done = install(wheels, tmp_path / "home")
    assert done.returncode == 1
    assert "no Python here has wheels" in done.stderr
    assert "riscv64-3.11" in done.stderr
    assert done.stderr.count("\n") == 1
    assert install(wheels, tmp_path / "home", "--here").stderr.startswith("install.sh: usage: ")
