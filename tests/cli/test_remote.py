"""Commands on models at addresses: what plan says, what is kept, what is never printed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.remote import stand_ins
from edgemerge.sizes import format_size
from tests.support.file_server import FileServer, serve_folder
from tests.support.small_models import wide_tensors, write_gguf

TIES = ("-m", "ties", "-P", "density=0.5")
SMALL = ("--memory", "72MiB", "--threads", "2")


@pytest.fixture(name="server")
def _server(tmp_path: Path) -> Iterator[FileServer]:
    folder = tmp_path / "models"
    folder.mkdir()
    base = wide_tensors(0)
    for number, name in enumerate(("base", "a", "b")):
        tensors = dict(base) if name == "base" else wide_tensors(number, base)
        tensors["token_embd.weight"] = np.random.default_rng(number).random((9000, 256), np.float32)
        write_gguf(folder / f"{name}.gguf", tensors)
    with serve_folder(folder) as server:
        yield server
        stand_ins.remove_all()


def run(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(make_app(), list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def ties(server: FileServer, *more: str | Path) -> list[str | Path]:
    """Arguments of a merge that in a small budget reads large tensors more than once."""
    there = [f"{server.url}/{name}.gguf?token=s3cret" for name in ("a", "b")]
    return [*there, *TIES, "--base", f"{server.url}/base.gguf", *SMALL, *more]


def test_plan_says_what_comes_over_the_network_and_which_part_twice(
    server: FileServer, tmp_path: Path
) -> None:
    document = json.loads(run("plan", *ties(server, "--json")))
    assert document["models"] == [f"{server.url}/{name}.gguf" for name in ("base", "a", "b")]
    assert document["network_bytes"] == document["read_bytes"]
    assert document["passes"] > 1
    text = run("plan", *ties(server))
    assert f"network: at most {format_size(document['read_bytes'])} of 3 models" in text
    spilled = json.loads(run("plan", *ties(server, "--json", "--spill", tmp_path)))
    once, kept = spilled["network_bytes"], spilled["spill_bytes"]
    assert 0 < kept < once < document["network_bytes"]
    assert f"with --spill DIR it is {format_size(once)}, and DIR needs at most" in text
    assert f"{format_size(kept)} of it in {tmp_path} meanwhile" in run(
        "plan", *ties(server, "--spill", tmp_path)
    )
    assert "s3cret" not in text
    assert "network" not in run("plan", server.folder / "a.gguf", "-m", "linear")


def test_what_is_spilled_is_not_fetched_again(server: FileServer, tmp_path: Path) -> None:
    def merged(*more: str | Path) -> tuple[str, int]:
        stand_ins.remove_all()
        server.sent = 0
        out = tmp_path / "out.gguf"
        report = run("merge", *ties(server, "-o", out, "--force", "--json", *more))
        return json.loads(report)["sha256"], server.sent

    size = sum(path.stat().st_size for path in server.folder.iterdir())
    first, sent = merged()
    again, sent_with_spill = merged("--spill", tmp_path)
    assert first == again
    assert sent > 2 * size
    assert sent_with_spill < 1.5 * size
    run("merge", *ties(server, "-o", tmp_path / "x.gguf", "--spill", tmp_path / "none"), code=2)


def test_what_is_kept_is_fetched_once_and_known_again(server: FileServer, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    arguments = [f"{server.url}/a.gguf?token=s3cret", "--type", "Q8_0", "--json"]
    plain = json.loads(run("convert", *arguments, "-o", tmp_path / "one.gguf"))
    stand_ins.remove_all()
    arguments += ["--keep-remote", str(kept)]
    first = json.loads(run("convert", *arguments, "-o", tmp_path / "two.gguf"))
    assert first["sha256"] == plain["sha256"]
    raw = (server.folder / "a.gguf").read_bytes()
    (found,) = (kept / "sha256").iterdir()
    assert found.name == hashlib.sha256(raw).hexdigest()
    assert found.read_bytes() == raw
    assert b"s3cret" not in b"".join(p.read_bytes() for p in kept.rglob("*.json"))
    server.requests.clear()
    run("convert", *arguments, "-o", tmp_path / "three.gguf")
    assert server.asked("a.gguf") == ["bytes=0-0"]
    (begun,) = [p.stem for p in (kept / "known").iterdir()]
    found.rename(kept / "begun" / begun)
    with (kept / "begun" / begun).open("r+b") as file:
        file.truncate(1000)
    server.requests.clear()
    run("convert", *arguments, "-o", tmp_path / "four.gguf")
    assert server.asked("a.gguf") == ["bytes=0-0", f"bytes=1000-{len(raw) - 1}", "bytes=0-0"]
    assert found.read_bytes() == raw


def test_the_folder_to_keep_them_in_may_be_relative(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("convert", f"{server.url}/a.gguf", "--keep-remote", "kept", "-o", "one.gguf")
    assert list(Path("kept/sha256").iterdir())


def test_a_file_in_place_of_the_folder_to_keep_them_in_is_named(
    server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "kept").write_text("")
    words = ("convert", f"{server.url}/a.gguf", "--keep-remote", tmp_path / "kept")
    said = run(*words, "-o", tmp_path / "one.gguf", code=1)
    assert "give a folder that can be written, or leave out --keep-remote" in " ".join(said.split())


def test_inspect_shows_an_address_without_its_secrets(server: FileServer) -> None:
    address = server.url.replace("//", "//user:passw0rd@") + "/a.gguf?token=s3cret"
    text = run("inspect", address, "--against", address)
    assert f"({server.url}/a.gguf)" in text
    for word in ("passw0rd", "s3cret", "/tmp/edgemerge-"):
        assert word not in text
    refused = run("run", address, "-p", "x", code=1)
    assert "passw0rd" not in refused


def test_verify_reads_a_merged_file_and_its_inputs_where_they_are(
    server: FileServer, tmp_path: Path
) -> None:
    out = server.folder / "merged.gguf"
    run("merge", *(server.folder / f"{name}.gguf" for name in "ab"), "-m", "linear", "-o", out)
    address = server.url.replace("//", "//user:passw0rd@") + "/{}.gguf?token=s3cret"
    given = [f"--input={address.format(name)}" for name in "ab"]
    text = run("verify", address.format("merged"), *given)
    assert f"{server.url}/merged.gguf: all" in text
    assert "as the given model's" in text
    document = json.loads(run("verify", address.format("merged"), *given, "--json"))
    assert document["files"] == [f"{server.url}/merged.gguf"]
    assert document["inputs_checked"]
    with out.open("r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(range(90)))
    stand_ins.remove_all()
    damaged = run("verify", address.format("merged"), code=1)
    assert f"{server.url}/merged.gguf: 1 of" in damaged
    swapped = run("verify", server.folder / "a.gguf", *given, code=1)
    assert "has no provenance section" in swapped
    refused = run("verify", address.format("merged"), "--key", tmp_path / "pub.pem", code=1)
    assert "--key checks a file on this machine" in refused
    for said in (text, damaged, refused):
        assert "passw0rd" not in said
        assert "s3cret" not in said


@pytest.mark.parametrize("command", ["merge", "plan", "search"])
def test_a_recipe_at_an_address_is_to_be_downloaded_first(command: str, tmp_path: Path) -> None:
    address = "https://user:s3cret@127.0.0.1:9/ward.yml"
    more = {
        "merge": ("-o", tmp_path / "out.gguf"),
        "search": ("--task", f"q={tmp_path / 'q.jsonl'}"),
    }
    if command == "search":
        pytest.importorskip("optuna")
        line = {"question": "?", "options": ["yes", "no"], "answer": 0}
        (tmp_path / "q.jsonl").write_text(json.dumps(line))
    text = run(command, address, *more.get(command, ()), code=1)
    assert text.strip() == (
        "edgemerge: https://127.0.0.1:9/ward.yml: a recipe is read from a file of this machine, and only its "
        "models from addresses; download it first, as with curl -O, and give its path"
    )


def test_other_commands_name_the_address_and_not_its_secrets(tmp_path: Path) -> None:
    address, out = "http://user:s3cret@127.0.0.1:9/a.gguf?token=s3cret", str(tmp_path / "out")
    for given in (
        ("compare", address, "b"),
        ("extract", address, "b", "-o", out),
    ):
        text = run(*given, code=1)
        assert "http://127.0.0.1:9/a.gguf: an address is read by merge, plan, convert," in text
        assert "s3cret" not in text
