from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgemerge.errors import OutputError, RecipeError
from edgemerge.runtime.llama import Lora
from edgemerge.runtime.serve import systemd
from edgemerge.runtime.serve.systemd import Service, make_unit, write_unit

NASTY = "a $HOME %n \"q\" back\\slash 'é';.gguf"
KEY = 'k3y-`with"$pecial\\signs'


@pytest.fixture
def service(tmp_path: Path) -> Service:
    model = tmp_path / NASTY
    model.write_bytes(b"GGUF")
    return Service(
        models={"ward": model}, host="127.0.0.1", port=8080, grace=30.0, memory=512 << 20
    )


@pytest.fixture
def everybody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's tests lie in a temporary folder of root, which a service could not read."""
    monkeypatch.setattr(systemd, "_choose_user", lambda _files: None)


def setting(unit: str, name: str) -> str:
    (value,) = [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{name}=")]
    return value


def analyze(unit: str, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("the unit is not checked by systemd: there is no systemd-analyze")
    (folder / systemd.NAME).write_text(unit, encoding="utf-8")
    runtime = folder / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    return subprocess.run(
        ["systemd-analyze", *command, str(folder / systemd.NAME)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime), "SYSTEMD_COLORS": "0"},
    )


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("system", [False, True])
def test_systemd_finds_nothing_wrong(
    service: Service, tmp_path: Path, system: bool, host: str, gpu: bool
) -> None:
    unit = make_unit(replace(service, host=host, gpu=gpu), system=system, key_file=tmp_path / "k")
    result = analyze(unit, tmp_path, "verify", "--man=no", *([] if system else ["--user"]))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(("gpu", "most"), [(False, 1.5), (True, 2.0)])
def test_service_is_exposed_little(
    service: Service, tmp_path: Path, gpu: bool, most: float
) -> None:
    unit = make_unit(replace(service, gpu=gpu, host="0.0.0.0"), system=True)
    result = analyze(unit, tmp_path, "security", "--offline=true")
    if "unrecognized option" in result.stderr:
        pytest.skip("the unit's exposure is not measured: this systemd-analyze is too old")
    exposure = result.stdout.rpartition("service: ")[2].split()[0]
    assert float(exposure) <= most, result.stdout


def test_command_is_absolute_and_quoted(service: Service, tmp_path: Path) -> None:
    options = ("--queue", "4", ";", "50%")
    lora = Lora(tmp_path / "adapter.gguf", 0.5)
    unit = make_unit(replace(service, options=options, loras=(lora,)), system=True)
    assert setting(unit, "ExecStart") == (
        f":{sys.executable} -P -m edgemerge serve --host 127.0.0.1 --port 8080 --grace 30 "
        f'--memory 536870912 --lora {tmp_path}/adapter.gguf=0.5 --queue 4 ";" 50%% -- '
        f'"ward={tmp_path}/a $HOME %%n \\"q\\" back\\\\slash \'é\';.gguf"'
    )
    relative = Path(os.path.relpath(tmp_path)) / "m.gguf"
    unit = make_unit(replace(service, models={"m": relative}), system=True)
    assert setting(unit, "ExecStart").endswith(f" {relative.absolute()}")
    odd = tmp_path / "epoch=3.gguf"  # `epoch=3=FILE` would be read as a name and another file
    unit = make_unit(replace(service, models={"epoch=3": odd}), system=True)
    assert setting(unit, "ExecStart").endswith(f" -- {odd}")


def test_names_cannot_add_settings(service: Service) -> None:
    (path,) = service.models.values()
    unit = make_unit(replace(service, models={"a\nExecStartPre=/bin/x\n%n": path}), system=True)
    assert "\nExecStartPre" not in unit
    assert setting(unit, "Description").endswith("a ExecStartPre=/bin/x %%n")
    assert '"a\\x0aExecStartPre=/bin/x\\x0a%%n=' in setting(unit, "ExecStart")


def test_limits_leave_room(service: Service) -> None:
    unit = make_unit(service, system=True)
    assert int(setting(unit, "MemoryMax")) == (512 + 256) << 20
    assert float(setting(unit, "TimeoutStopSec")) > service.grace
    assert setting(unit, "Restart") == "on-failure"
    large = make_unit(replace(service, memory=4 << 30), system=True)
    assert int(setting(large, "MemoryMax")) == 5 << 30
    assert "MemoryMax" not in make_unit(replace(service, memory=None), system=True)


def test_gpu_opens_its_devices_only_where_asked(service: Service) -> None:
    closed = make_unit(service, system=True)
    assert "PrivateDevices=yes" in closed
    assert "MemoryDenyWriteExecute=yes" in closed
    opened = make_unit(replace(service, gpu=True), system=True)
    assert "DevicePolicy=closed" in opened
    assert "DeviceAllow=char-nvidia* rw" in opened
    assert not {"PrivateDevices", "MemoryDenyWriteExecute", "PrivateUsers"} & {
        line.partition("=")[0] for line in opened.splitlines()
    }


def test_only_a_local_server_is_cut_off_from_the_network(service: Service) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert "IPAddressDeny=any" in make_unit(replace(service, host=host), system=True)
    for host in ("0.0.0.0", "192.168.1.7", "::", "board.local"):
        unit = make_unit(replace(service, host=host), system=True)
        assert "IPAddressDeny" not in unit
        assert "After=network-online.target" in unit


def test_rpc_workers_can_be_reached(service: Service) -> None:
    near = replace(service, rpc=("127.0.0.1:50052",))
    assert setting(make_unit(near, system=True), "IPAddressAllow") == "localhost"
    assert near.command()[-4:-1] == ["--rpc", "127.0.0.1:50052", "--"]
    far = replace(service, rpc=("10.8.0.2:50052", "127.0.0.1:50052"))
    assert setting(make_unit(far, system=True), "IPAddressAllow") == "localhost 10.8.0.2"
    assert "--i-trust-this-network" in far.command()


def test_low_port_gets_its_capability(service: Service) -> None:
    unit = make_unit(replace(service, port=80), system=True)
    assert setting(unit, "AmbientCapabilities") == "CAP_NET_BIND_SERVICE"
    assert "PrivateUsers" not in unit
    assert setting(make_unit(service, system=True), "CapabilityBoundingSet") == ""


def test_users_unit_has_only_what_a_users_manager_can_do(service: Service) -> None:
    unit = make_unit(service, system=False)
    names = {line.partition("=")[0] for line in unit.splitlines()}
    assert not {"DynamicUser", "User", "ProtectSystem", "CapabilityBoundingSet"} & names
    assert setting(unit, "WantedBy") == "default.target"
    assert setting(unit, "NoNewPrivileges") == "yes"


def test_key_is_in_a_file_of_its_own(
    service: Service, tmp_path: Path, everybody_reads: None
) -> None:
    folder = tmp_path / "units"
    told = write_unit(replace(service, api_key=KEY), directory=folder)
    unit, key = folder / "edgemerge.service", folder / "edgemerge.env"
    assert KEY not in unit.read_text() + told
    assert setting(unit.read_text(), "EnvironmentFile") == str(key)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(unit.stat().st_mode) & 0o022 == 0
    # a POSIX shell reads the file as systemd does
    script = f'. "{key}"; printf %s "$EDGEMERGE_API_KEY"'
    assert subprocess.check_output(["sh", "-c", script], text=True) == KEY
    assert sorted(folder.iterdir()) == [key, unit]
    assert unit.read_text() in told
    assert KEY not in repr(replace(service, api_key=KEY))


def test_existing_unit_is_replaced_only_with_force(
    service: Service, tmp_path: Path, everybody_reads: None
) -> None:
    write_unit(service, directory=tmp_path)
    before = (tmp_path / systemd.NAME).read_text()
    with pytest.raises(OutputError, match="exists already; give --force"):
        write_unit(replace(service, port=9090), directory=tmp_path)
    assert (tmp_path / systemd.NAME).read_text() == before
    write_unit(replace(service, port=9090), directory=tmp_path, force=True)
    assert "--port 9090" in (tmp_path / systemd.NAME).read_text()


def test_tells_how_to_start_it(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everybody_reads: None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    told = write_unit(service)
    assert f"wrote {tmp_path}/systemd/user/edgemerge.service" in told
    assert "  systemctl --user daemon-reload\n  systemctl --user enable --now edgemerge\n" in told
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    told = write_unit(service, directory=tmp_path)
    assert told.endswith("  systemctl daemon-reload\n  systemctl enable --now edgemerge")


def test_refuses_what_cannot_work(service: Service, tmp_path: Path, everybody_reads: None) -> None:
    with pytest.raises(RecipeError, match="a port of its own"):
        write_unit(replace(service, port=0), directory=tmp_path)
    for key in ("two words", "line\nend", "é", ""):
        with pytest.raises(RecipeError, match="printable ASCII"):
            write_unit(replace(service, api_key=key), directory=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_unit(service, directory=tmp_path / "file")


def test_files_that_the_service_cannot_read(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = service.models.values()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr(systemd, "_TEMPORARY", (tmp_path,))
    with pytest.raises(OutputError, match="cannot look into"):
        write_unit(service, directory=tmp_path / "units")
    monkeypatch.setattr(systemd, "_TEMPORARY", ())
    monkeypatch.setattr(Service, "files", lambda self: [model])
    model.chmod(0o600)
    with pytest.raises(OutputError, match="closed to other users") as error:
        write_unit(service, directory=tmp_path / "units")
    assert error.value.path == model
    assert not (tmp_path / "units").exists()

    me = pwd.getpwuid(os.getuid())
    nobody = pwd.struct_passwd((*me[:2], 12345, 12345, *me[4:]))
    assert systemd._find_blocked([model], nobody) == (model, model)
    # whoever called sudo may be the owner
    monkeypatch.setenv("SUDO_USER", "pi")
    monkeypatch.setattr(pwd, "getpwnam", {"pi": me}.__getitem__)
    assert "It runs as pi" in write_unit(service, directory=tmp_path / "units")
    assert setting((tmp_path / "units" / systemd.NAME).read_text(), "User") == "pi"
