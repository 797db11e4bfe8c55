"""publish and fetch from the first key to a merge, as two machines do it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from tests.support.file_server import serve_folder
from tests.support.registries import write_delta
from tests.support.small_models import wide_tensors, write_gguf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, an empty registry, its root and a delta."""
    folder = tmp_path_factory.mktemp("made") / "site"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder.parent))
        for name in ("root", "publisher"):
            run(f"keygen {name}")
        run("publish registry --init --root-key root.pem --key publisher.pem")
        shutil.copy("registry/metadata/1.root.json", "root.json")
        write_delta(Path("a.gguf"))
    return folder


@pytest.fixture(autouse=True)
def _apart(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a copy; what this machine knows of registries is of one test."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(line: str, *more: str, code: int = 0) -> str:
    result = CliRunner().invoke(make_app(), [*line.split(), *more], prog_name="edgemerge")
    assert result.exit_code == code, result.output
    return result.output


def run_json(line: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(f"{line} --json"))
    return document


def test_a_delta_goes_from_one_machine_to_a_merge_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = wide_tensors(0)
    for seed, name in enumerate(("base", "expert", "other")):
        write_gguf(Path(f"{name}.gguf"), base if name == "base" else wide_tensors(seed, base))
    run("delta base.gguf expert.gguf -o a.delta.gguf --bits 4")
    said = run(
        "publish registry a.delta.gguf --name ward --version 1 --key publisher.pem --base base.gguf",
        "--licence",
        "CC BY 4.0",
    )
    assert "ward 1: delta" in said
    assert "licence CC BY 4.0" in said
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    with serve_folder(tmp_path / "registry") as server:
        (listed,) = run_json(f"fetch {server.url} --trust root.json")["entries"]
        assert (listed["name"], listed["version"], listed["kind"]) == ("ward", "1", "delta")
        found = run_json(f"fetch {server.url} ward -o got --trust root.json")
        assert found == {"path": "got/ward-1.delta.gguf", **listed}
        said = run(f"fetch {server.url} ward@1 -o got --trust root.json")
    assert "got/ward-1.delta.gguf  delta" in said
    assert "verified" in said
    assert Path(found["path"]).read_bytes() == Path("a.delta.gguf").read_bytes()
    run(f"merge -m linear --base base.gguf {found['path']} other.gguf -o ward.gguf --type F16")
    said = run(f"merge -m linear --base other.gguf {found['path']} base.gguf -o x.gguf", code=1)
    assert (
        "other.gguf: their checksums differ; give the model that it was made for, 'base.gguf'"
        in said
    )
    assert not Path("x.gguf").exists()


def test_the_life_of_a_registry() -> None:
    publish = "publish registry a.gguf --name ward --key publisher.pem --version"
    assert run_json(f"{publish} 1")["entry"]["version"] == "1"
    assert "had the version 1 already" in run(f"{publish} 1", code=1)
    run(f"{publish} 2")
    fetch = "fetch registry --trust root.json"
    assert [line.split()[:2] for line in run(fetch).splitlines()[1:]] == [
        ["ward", "1"],
        ["ward", "2"],
    ]
    assert "without ward 2" in run("publish registry --remove ward@2 --key publisher.pem")
    assert run_json(f"{fetch} ward")["version"] == "1"
    assert "signed anew" in run("publish registry --refresh --key publisher.pem --expires 7d")
    run("keygen new")
    rotate = "publish registry --rotate --root-key root.pem --key new.pem --key publisher.pem"
    said = run(f"{rotate} --retire publisher.pub.pem")
    assert said.startswith("registry/metadata/2.root.json  lasts until ")
    assert "may not sign here" in run("publish registry --refresh --key publisher.pem", code=1)
    assert run_json("publish registry --refresh --key new.pem")["did"] == "refresh"
    assert run_json(f"{fetch} ward")["version"] == "1"
    said = run("publish registry --refresh --key new.pem --expires 900d")
    assert "note: readers take the root until " in said


def test_an_interrupted_fetch_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemerge.fleet.registry import carrier

    run("publish registry a.gguf --name ward --key publisher.pem --version 1")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(carrier, "_read", interrupt)
    said = run("fetch registry ward -o got --trust root.json", code=130)
    assert said == (
        "edgemerge: interrupted; what came is kept; give the same command again, which goes on\n"
    )


def test_an_attack_is_one_sentence() -> None:
    run("publish registry a.gguf --name ward --key publisher.pem --version 1")
    path = next(Path("registry/targets").rglob("*.gguf"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    said = run("fetch registry ward -o got --trust root.json", code=1)
    assert said.count("\n") == 1
    assert said.startswith("edgemerge: registry/targets/ward/1/")
    assert "is not the file that the index names" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("publish registry --key publisher.pem", "give one of --init, --refresh"),
        ("publish registry a.gguf --refresh --key publisher.pem", "give one of --init, --refresh"),
        ("publish registry a.gguf --key publisher.pem", "give --name and --version"),
        ("publish registry a.gguf --name a --version 1", "give the publisher's --key"),
        ("publish registry --init --key publisher.pem", "give the --root-key"),
        ("publish registry --refresh --key publisher.pem --name a", "--name belongs to FILE"),
        (
            "publish registry --refresh --key publisher.pem --retire a",
            "--retire belongs to --rotate",
        ),
        ("publish x --init --root-key root.pem --retire a", "--retire belongs to --rotate"),
        (
            "publish registry --refresh --root-key root.pem --key publisher.pem",
            "--root-key belongs to",
        ),
        ("publish registry --refresh --key publisher.pem --expires 90", "give days, as in 90d"),
        ("publish registry --remove ward --key publisher.pem", "give NAME@VERSION"),
        ("fetch registry ward@ --trust root.json", "give a version after the @"),
        ("fetch registry ward", "--trust"),
    ],
)
def test_a_line_that_asks_for_nothing_clear_is_refused(line: str, words: str) -> None:
    assert words in " ".join(run(line, code=2).replace("│", " ").split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("publish registry --refresh --key none.pem", "there is no such file"),
        ("publish registry --refresh --key publisher.pub.pem", "is a public key"),
        ("publish registry a.gguf --name A --version 1 --key publisher.pem", "the name 'A' cannot"),
        ("publish https://host/x --refresh --key publisher.pem", "copy the folder to the server"),
        (
            "publish nowhere --refresh --key publisher.pem",
            "is no registry; make one with publish --init",
        ),
        ("publish registry --init --root-key root.pem", "is a registry already"),
        ("fetch nowhere --trust root.json", "there is no registry: no such folder"),
        ("fetch registry --trust rot.json", "did you mean 'root.json'?"),
        ("fetch registry --trust a.gguf", "is no root of a registry"),
        ("fetch registry wart --trust root.json", "the registry has no 'wart'; it is empty"),
    ],
)
def test_what_is_wrong_is_said(line: str, words: str) -> None:
    assert words in run(line, code=1)


def test_a_licence_of_many_lines_is_not_published() -> None:
    publish = "publish registry a.gguf --name ward --version 1 --key publisher.pem"
    assert "give the licence's name" in run(publish, "--licence", "A\nB", code=1)
    assert run_json("fetch registry --trust root.json") == {"entries": []}


def test_what_is_left_out_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = "publish registry a.gguf --key publisher.pem --name"
    run(f"{publish} ward --version 1")
    with monkeypatch.context() as patch:  # as a newer edgemerge may
        patch.setattr("edgemerge.fleet.registry.publishing.is_licence", lambda _: True)
        run(f"{publish} lab --version 1", "--licence", "A\nB")
    said = run("fetch registry --trust root.json")
    assert "note: registry/metadata/3.targets.json: has an entry 'lab/1/" in said
    assert "ward  1" in said
    assert "ward-1.delta.gguf" in run("fetch registry ward --trust root.json -o got")


def test_a_refresh_says_whose_key_is_needed_next() -> None:
    run("keygen timer")
    rotate = "publish registry --rotate --root-key root.pem --key publisher.pem --expires 30d"
    run(f"{rotate} --refresher timer.pub.pem")
    refresh = "publish registry --refresh --json --key timer.pem --expires"
    short, long = (json.loads(run(f"{refresh} {days}d")) for days in (7, 90))
    assert short["expires"] < long["expires"] == long["index_expires"] == short["index_expires"]
    day = long["expires"][:10]
    line = refresh.replace(" --json", "")
    said = run(f"{line} 90d")
    assert f"until {day}; before that, publish --refresh with a publisher's key\n" in said
    assert f"publish --refresh, with a publisher's key before {day}\n" in run(f"{line} 7d")
