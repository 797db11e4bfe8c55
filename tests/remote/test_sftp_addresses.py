"""sftp:// addresses, against OpenSSH's server and one of paramiko's in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from edgemerge import merge
from edgemerge.errors import EdgemergeError, FormatError, Stopped
from edgemerge.finding.finder import Finder
from edgemerge.recipe.recipe import make_recipe
from edgemerge.remote import failures, stand_ins
from edgemerge.remote.stores.address import read_store_address
from edgemerge.remote.stores.file import StoreFile, look
from edgemerge.remote.stores.link import StoreLink
from tests.support.crashing import write_models
from tests.support.remote_merges import merge_in_process, write_large_models, write_shards

paramiko = pytest.importorskip("paramiko")
from tests.support.sftp_server import (  # noqa: E402
    PASSWORD,
    USER,
    SftpServer,
    openssh,
    serve_sftp,
)

STREAMS = Finder(streams=True)
LOGIN = f"{USER}:{quote(PASSWORD, safe='')}@"


@pytest.fixture(name="models")
def _models(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_models(folder)


@pytest.fixture(name="home")
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's home, without an agent; clients do not wait long, and nothing of them is left."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr(failures, "FIRST_DELAYS", (0.0, 0.01))
    monkeypatch.setattr(failures, "DELAYS", (0.0, 0.1, 0.5, 1.0, 2.0))
    (tmp_path / "home").mkdir()
    yield tmp_path / "home"
    stand_ins.remove_all()


@pytest.fixture(name="server")
def _server(home: Path) -> Iterator[SftpServer]:
    with serve_sftp(home) as server:
        yield server


def merged(models: list[str], output: Path, **settings: object) -> str:
    recipe = make_recipe(
        "linear", [(model, None) for model in models], out_type="Q8_0", finder=STREAMS
    )
    return merge(recipe, output, threads=2, **settings).sha256  # type: ignore[arg-type]


def at(server: SftpServer, models: dict[str, str]) -> list[str]:
    return [server.at(Path(models[name])) for name in "ab"]


def test_a_merge_over_sftp_has_the_bytes_of_one_from_disk(
    server: SftpServer, models: dict[str, str], tmp_path: Path
) -> None:
    wanted = merged([models["a"], models["b"]], tmp_path / "here.gguf")
    assert merged(at(server, models), tmp_path / "there.gguf") == wanted


def test_openssh_gives_files_and_directories(
    home: Path, models: dict[str, str], models_dir: Path, tmp_path: Path
) -> None:
    command = openssh(home)
    if command is None:
        pytest.skip("OpenSSH's server is not installed")
    wanted = merged([models["a"], models["b"]], tmp_path / "here.gguf")
    shards = write_shards(models_dir / "base", tmp_path / "shards")
    folders = [models_dir / "expert-a", shards]
    wanted_of_folders = merged(list(map(str, folders)), tmp_path / "folders.gguf")
    with serve_sftp(home, command) as server:
        assert merged(at(server, models), tmp_path / "there.gguf") == wanted
        there = list(map(server.at, folders))
        assert merged(there, tmp_path / "folders-there.gguf") == wanted_of_folders
        (home / ".ssh" / "id_ecdsa").unlink()
        with pytest.raises(EdgemergeError, match="refuses the login; see that ssh to it works"):
            STREAMS.find_model(server.at(Path(models["a"]), LOGIN))


def test_a_password_opens_and_is_written_nowhere(
    server: SftpServer, home: Path, models: dict[str, str], tmp_path: Path
) -> None:
    (home / ".ssh" / "id_ecdsa").unlink()
    wanted = merged([models["a"]], tmp_path / "here.gguf")
    address = server.at(Path(models["a"]), LOGIN)
    kept = Finder(streams=True, keep=tmp_path / "kept")
    for i, finder in enumerate((STREAMS, kept, kept)):
        recipe = make_recipe("linear", [(address, None)], out_type="Q8_0", finder=finder)
        report = merge(recipe, tmp_path / f"{i}.gguf")
        assert report.sha256 == wanted
        assert "s3cret" not in repr(report)
        assert b"s3cret" not in (tmp_path / f"{i}.gguf").read_bytes()
    assert b"s3cret" not in b"".join(p.read_bytes() for p in (tmp_path / "kept").rglob("*.json"))
    with pytest.raises(EdgemergeError) as error:
        STREAMS.find_model(address.replace(USER, "other"))
    assert "s3cret" not in str(error.value)
    assert "refuses the login" in str(error.value)


def test_a_host_must_be_known(server: SftpServer, home: Path, models: dict[str, str]) -> None:
    known = home / ".ssh" / "known_hosts"
    line = known.read_text()
    known.unlink()
    with pytest.raises(FormatError, match=r"a\.gguf: is on a host whose key is not in ~/\.ssh/kno"):
        STREAMS.find_model(at(server, models)[0])
    other = paramiko.ECDSAKey.generate()
    known.write_text(f"{line.rpartition(' ')[0]} {other.get_base64()}\n")
    with pytest.raises(FormatError, match="is on a host whose key is another than"):
        STREAMS.find_model(at(server, models)[0])


def test_the_configuration_of_ssh_names_host_port_and_proxy(
    server: SftpServer, home: Path, models: dict[str, str], tmp_path: Path
) -> None:
    relay = tmp_path / "relay.py"
    relay.write_text(
        "import os, socket, sys, threading\n"
        "there = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "def pump(read, write):\n"
        "    while raw := read():\n"
        "        write(raw)\n"
        "ends = lambda: os.read(0, 65536), there.sendall\n"
        "threading.Thread(target=pump, args=ends, daemon=True).start()\n"
        "pump(lambda: there.recv(65536), lambda raw: os.write(1, raw))\n"
    )
    (home / ".ssh" / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {server.port}\n"
        f"  ProxyCommand {sys.executable} {relay} %p\n"
    )
    wanted = merged([models["a"]], tmp_path / "here.gguf")
    address = f"sftp://board{models['a']}"
    assert merged([address], tmp_path / "there.gguf") == wanted
    raw = (tmp_path / "there.gguf").read_bytes()
    assert b"board" not in raw
    (home / ".ssh" / "config").write_text("Host board\n  Match nonsense\n")
    with pytest.raises(FormatError, match=r"as ~/\.ssh/config cannot be read"):
        STREAMS.find_model(address)


def test_a_host_is_no_command_and_no_option(home: Path, tmp_path: Path) -> None:
    (home / ".ssh").mkdir()
    (home / ".ssh" / "config").write_text(f'Match exec "echo %h >>{tmp_path}/asked"\n  Port 9\n')
    for host in ("x;touch ${HOME-}pwned;", "-e evil", "-oX", "a b", ".."):
        for scheme in ("sftp", "ssh"):
            with pytest.raises(EdgemergeError, match="has a host that is no plain name; give it"):
                STREAMS.find_model(f"{scheme}://{host}/model.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def test_what_is_wrong_with_the_files_of_ssh_is_told(
    server: SftpServer, home: Path, models: dict[str, str], tmp_path: Path
) -> None:
    config, known = home / ".ssh" / "config", home / ".ssh" / "known_hosts"
    address = at(server, models)[0]

    def refusal(setting: str) -> str:
        config.write_text(f"Host 127.0.0.1\n  {setting}\n", encoding="latin-1")
        with pytest.raises(FormatError) as error:
            STREAMS.find_model(address)
        return str(error.value).removeprefix(f"{address}: cannot be reached, as ")

    reason = "No such file or directory: '/none/nc'"
    assert reason in refusal("ProxyCommand /none/nc %h %p")
    assert refusal("ProxyCommand nc '").startswith(
        "the proxy of ~/.ssh/config cannot be started (No"
    )
    assert refusal("Port ssh") == "~/.ssh/config states the port 'ssh'; mend it"
    assert refusal("# fünf").startswith("~/.ssh/config cannot be read ('utf-8' codec can't decode")
    key = f"{home} cannot be read (Is a directory); mend it"
    assert refusal(f"IdentityFile {home}") == key
    config.write_text("IdentityFile ~/.ssh/none\n")  # which ssh goes without
    assert STREAMS.find_model(address)
    known.write_bytes(known.read_bytes() + "# fünf\n".encode("latin-1"))
    assert refusal("# five").startswith("~/.ssh/known_hosts cannot be read ('utf-8' codec can't")


def test_a_server_that_starts_again_is_read_on(
    home: Path, models: dict[str, str], tmp_path: Path
) -> None:
    wanted = merged([models["a"], models["b"]], tmp_path / "here.gguf")
    with serve_sftp(home) as server:
        recipe = make_recipe(
            "linear", [(one, None) for one in at(server, models)], out_type="Q8_0", finder=STREAMS
        )
        killed: list[int] = []

        def kill_once(done: int, total: int) -> None:
            if not killed:
                killed.append(done)
                server.process.kill()
                server.process.wait()
                server.process = subprocess.Popen(server.process.args)

        try:
            report = merge(recipe, tmp_path / "there.gguf", threads=2, progress=kill_once)
        finally:
            server.process.kill()
            server.process.wait()
    assert killed
    assert report.sha256 == wanted


def test_a_file_that_changes_is_not_merged(
    server: SftpServer, models: dict[str, str], tmp_path: Path
) -> None:
    recipe = make_recipe("linear", [(at(server, models)[0], None)], finder=STREAMS)
    time.sleep(1.1)  # SFTP's times are whole seconds
    Path(models["a"]).touch()
    with pytest.raises(FormatError, match=r"a\.gguf: was changed on the server while it was read"):
        merge(recipe, tmp_path / "out.gguf")


def test_what_cannot_be_read_is_one_sentence(
    server: SftpServer, models: dict[str, str], tmp_path: Path
) -> None:
    def refusal(text: str) -> str:
        with pytest.raises(EdgemergeError) as error:
            STREAMS.find_model(text)
        return str(error.value)

    there = server.at(tmp_path / "none.gguf", LOGIN)
    shown = there.replace(LOGIN, "")
    assert refusal(there) == f"{shown}: is not there; check the address"
    (tmp_path / "empty.gguf").touch()
    assert refusal(server.at(tmp_path / "empty.gguf")).endswith("is empty; get another")
    assert "is no model folder" in refusal(server.at(tmp_path))
    nowhere = refusal("sftp://user:s3cret@127.0.0.1:9/a.gguf")
    assert nowhere.startswith("sftp://127.0.0.1:9/a.gguf: could not be read in 3 tries (Unable to")
    broken = refusal("sftp://user:12/3@host/a.gguf")
    assert "write / and @ of a login as %2F" in broken
    assert "12/3" not in broken


@pytest.fixture(name="file")
def _file(server: SftpServer, tmp_path: Path) -> Iterator[StoreFile]:
    (tmp_path / "data.gguf").write_bytes(np.random.default_rng(0).bytes(4 << 20))
    address = read_store_address(server.at(tmp_path / "data.gguf"))
    link = StoreLink(address)
    file = StoreFile(address, look(link, address), None, link)
    yield file
    file.close()


def read(file: StoreFile, start: int, n_bytes: int) -> bytes:
    raw = bytearray(n_bytes)
    file.fill(
        [memoryview(raw)[: n_bytes // 2], memoryview(raw)[n_bytes // 2 :]], start, (7, 4 << 20)
    )
    return bytes(raw)


def test_any_ranges_from_any_threads_are_right(file: StoreFile, tmp_path: Path) -> None:
    raw = (tmp_path / "data.gguf").read_bytes()
    draw = np.random.default_rng(1)
    wrong: list[tuple[int, int]] = []

    def work(ranges: list[tuple[int, int]]) -> None:
        wrong.extend((a, n) for a, n in ranges if read(file, a, n) != raw[a : a + n])

    in_order = [(7 + i * 50_000, 50_000) for i in range(80)]
    jumps = [tuple(map(int, draw.integers((0, 1), (3 << 20, 1 << 20)))) for _ in range(15)]
    jobs: list[list] = [in_order[::2], in_order[1::2], jumps, in_order]
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_stop_ends_a_read_that_waits(file: StoreFile, server: SftpServer) -> None:
    assert len(read(file, 0, 100)) == 100
    caught: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                read(file, 0, 4 << 20)
        except BaseException as error:
            caught.append(error)

    server.process.send_signal(19)  # SIGSTOP
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    file.stop()
    thread.join()
    assert time.monotonic() - started < 10  # of the 30 s that a server may be silent
    assert isinstance(caught[0], Stopped)


def test_the_budget_holds_with_what_sftp_takes(
    home: Path, server: SftpServer, tmp_path: Path
) -> None:
    models = write_large_models(tmp_path)
    here = merge_in_process([str(path) for path in models], tmp_path / "here.gguf", "96MiB")
    there = merge_in_process(
        [server.at(path) for path in models], tmp_path / "there.gguf", "128MiB"
    )
    assert there["sha256"] == here["sha256"]
    assert int(there["peak_rss_bytes"]) <= 128 << 20
