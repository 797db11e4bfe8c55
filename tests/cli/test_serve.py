from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner, Result

from edgemerge.cli.serve import _announce, _with_site, serve_command
from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.serve.models import read_model_file
from edgemerge.runtime.serve.options import Started
from edgemerge.site.folder import SiteFolder
from tests.support.serving import COMMAND, Serving
from tests.support.talking import run
from tests.support.tiny_gguf import CONTEXT, write_tiny_gguf

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


def serve(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "EDGEMERGE_API_KEY"}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**clean, **environment},
    )


def assert_refused(done: subprocess.CompletedProcess[str], sentence: str, code: int = 1) -> None:
    assert done.returncode == code, done.stderr
    assert re.search(sentence, done.stderr), done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert code == 2 or done.stderr.startswith("edgemerge: ")


def test_it_says_what_it_serves_and_ends_well(gguf: Path) -> None:
    with Serving(f"ward={gguf}", gguf, "--memory", "2G", "--log-requests") as server:
        assert [model["id"] for model in server.get("/v1/models").json["data"]] == ["ward", "tiny"]
        assert server.health()["memory"]["limit"] == 2 << 30
        server.stop()
        assert server.wait() == 0
        assert '"GET /v1/models HTTP/1.1" 200' in server.log()


def test_help_is_light() -> None:
    command = [sys.executable, "-X", "importtime", *COMMAND[1:], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--api-key-file" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert (
        imported & {"llama_cpp", "starlette", "pydantic", "uvicorn", "numba", "prometheus_client"}
        == set()
    )


def test_an_open_address_needs_a_key(gguf: Path) -> None:
    assert_refused(serve(gguf, "--host", "0.0.0.0", "--port", 0), "--api-key-file")
    with Serving(gguf, "--host", "0.0.0.0", key="k3y-of-16-letters") as server:
        assert server.get("/v1/models").status == 200
        assert server.get("/v1/models", Authorization="").status == 401
        assert server.get("/health", Host="any.example").status == 200


@pytest.mark.parametrize(
    ("key", "said"), [("two words", "printable ASCII"), ("ä", "printable ASCII"), ("", "is empty")]
)
def test_a_key_that_no_header_can_have(gguf: Path, key: str, said: str) -> None:
    assert_refused(serve(gguf, "--port", 0, EDGEMERGE_API_KEY=key), said)


def test_an_open_address_needs_a_long_key(gguf: Path) -> None:
    done = serve(gguf, "--host", "0.0.0.0", "--port", 0, EDGEMERGE_API_KEY="k3y")
    assert_refused(done, "could guess an API key of 3 characters")


def test_the_key_can_be_in_a_file(gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("k3y\n")
    with Serving(gguf, "--api-key-file", file) as server:
        assert server.get("/v1/models").status == 401
        assert server.get("/v1/models", Authorization="Bearer k3y").status == 200
    assert_refused(serve(gguf, "--api-key-file", tmp_path / "none"), "No such file")
    done = serve(gguf, "--api-key-file", file, "--api-key", "k")
    assert_refused(done, "not both", code=2)


def test_a_port_in_use(gguf: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert_refused(serve(gguf, "--port", port), f"port {port}: .*in use; choose another")


def test_what_cannot_be_served(gguf: Path, tmp_path: Path) -> None:
    assert_refused(serve(tmp_path / "none.gguf"), "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:3000])
    assert_refused(serve(broken), "broken.gguf")
    assert_refused(serve(gguf, f"tiny={gguf}"), "two models are called tiny")
    assert_refused(serve(gguf, "--memory", "20M"), "more --memory or a smaller --ctx")
    assert_refused(serve(gguf, "--lora", gguf, gguf), "--lora goes with one model", code=2)
    assert_refused(serve(gguf, "--lora", gguf, "--port", 0), "cannot add this LoRA")
    assert_refused(serve(gguf, "--host", "no.such.host.invalid"), "cannot listen on no.such.host")
    assert_refused(serve(gguf, "--host", "a..b"), r"cannot listen on a\.\.b: no machine can have")


@pytest.mark.parametrize("module", ["pydantic", "starlette", "prometheus_client", "uvicorn"])
def test_a_missing_extra_is_one_sentence(gguf: Path, module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['edgemerge', 'serve', {str(gguf)!r}]\n"
        "from edgemerge.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert_refused(done, r"pip install 'edgemerge\[serve\]'")


def install_unit(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(serve_command)
    return CliRunner().invoke(app, ["--install", *map(str, arguments)])


def test_install_writes_a_unit_with_the_same_options(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(*options: object) -> Result:
        return install_unit(gguf, "--unit-dir", tmp_path, "--host", "0.0.0.0", *options)

    monkeypatch.setattr("os.geteuid", lambda: 1000)  # a user's service may read any place
    monkeypatch.delenv("EDGEMERGE_API_KEY", raising=False)
    assert "--api-key-file" in install().stderr
    monkeypatch.setenv("EDGEMERGE_API_KEY", "k3y-of-16-letters")
    options = ("--memory", "1G", "-c", 128, "--queue", 3, "--log-requests", "--grace", 9)
    done = install(*options, "--allow-host", "ward.example")
    assert done.exit_code == 0, done.stderr
    unit = (tmp_path / "edgemerge.service").read_text()
    assert "enable --now edgemerge" in done.stdout
    given = ("--ctx 128", "--queue 3", "--log-requests", "--grace 9", f"-- {gguf}")
    for text in (*given, "--allow-host ward.example", "--max-tokens 4096"):
        assert text in unit
    assert "k3y" not in unit + done.stdout
    assert stat.S_IMODE((tmp_path / "edgemerge.env").stat().st_mode) == 0o600
    assert "--force" in install().stderr
    assert install("--force").exit_code == 0
    monkeypatch.delenv("EDGEMERGE_API_KEY")
    assert install("--force", "--host", "127.0.0.1").exit_code == 0
    assert not (tmp_path / "edgemerge.env").exists()


@pytest.mark.parametrize(
    ("layers", "has_device", "is_open"),
    [
        ([], True, True),
        ([], False, False),
        ([], None, False),
        (["-g", 0], True, False),
        (["-g", 1], None, True),
    ],
)
def test_install_opens_a_gpu_that_serve_would_use(
    layers: list[object],
    has_device: bool | None,
    is_open: bool,
    gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault: without -g the unit closed the devices, and a build for GPUs computed without them."""

    def load() -> SimpleNamespace:
        if has_device is None:
            raise RuntimeFailure("running a model needs llama.cpp")
        return SimpleNamespace(has_device=lambda: has_device)

    monkeypatch.setattr("edgemerge.runtime.library.load_library", load)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.delenv("EDGEMERGE_API_KEY", raising=False)
    done = install_unit(gguf, "--unit-dir", tmp_path, *layers)
    assert done.exit_code == 0, done.stderr
    unit = (tmp_path / "edgemerge.service").read_text()
    assert ("MemoryDenyWriteExecute=yes" not in unit) == is_open
    told = "GPU devices are closed to it" in done.stdout
    assert told == (has_device is None and not layers)


def test_a_context_beyond_the_models_own_is_told_of(
    gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = Started("http://127.0.0.1", (read_model_file(gguf, 8192),), 1 << 30, has_key=False)
    _announce(started, n_ctx=8192)
    told = capsys.readouterr().out
    assert f" {CONTEXT} tokens of context each" in told
    assert "--ctx 8192 is more than it was trained on" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give a MODEL to begin with"),
        (["--site", "site"], "has no current model yet; give a MODEL to begin with"),
        (["MODEL", "--merge-from", "."], "--merge-from goes with --site DIR"),
        (["MODEL", "--site", "site", "--merge-from", "none"], "there is no such folder"),
        (["MODEL", "--site", "site", "--require-signature", "PUB"], "is not signed: leave out one"),
        (["MODEL", "--site", "site", "--install"], "leave out --log and --site"),
    ],
)
def test_a_devices_folder_goes_with_what_it_can(
    gguf: Path, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("serve", *(str(gguf) if word == "MODEL" else word for word in arguments))
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("models", "name"), [([], "ward-7"), (["a"], "a"), (["epoch=3", "c"], "epoch=3")]
)
def test_the_current_model_of_a_folder_takes_the_first_place(
    models: list[str], name: str, tmp_path: Path
) -> None:
    site = SiteFolder(tmp_path / "ward-7")
    site.make()
    site.current_path.write_text("")
    named = [(name, Path(f"{name}.gguf")) for name in models]
    assert _with_site(named, site.path) == ((name, site.current_path), *named[1:])
