"""Merges of models on another machine: the bytes of the same merge from this one's disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemerge import merge, open_model
from edgemerge.alignment.heads import align_models
from edgemerge.errors import EdgemergeError, FormatError
from edgemerge.finding.finder import Finder
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.remote import failures, stand_ins
from tests.support.adapters import KINDS, write_adapter
from tests.support.architecture_models import ARCHITECTURES
from tests.support.bounded import bounded
from tests.support.certificates import make_certificate
from tests.support.crashing import write_models
from tests.support.file_server import FileServer, serve_folder

STREAMS = Finder(streams=True)
PATIENCE = 15.0  # seconds


@pytest.fixture(name="models")
def _models(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_models(folder)


@pytest.fixture(name="server")
def _server(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FileServer]:
    """A server of the models, whose clients do not wait long; nothing of them is left."""
    monkeypatch.setattr(failures, "DELAYS", (0.0, 0.01, 0.01))
    monkeypatch.setattr(failures, "FIRST_DELAYS", (0.0, 0.01))
    with serve_folder(tmp_path / "models") as server:
        yield server
        stand_ins.remove_all()


def merged(models: list[str], output: Path, method: str = "linear", **settings: object) -> str:
    base = settings.pop("base", None)
    recipe = make_recipe(
        method,
        [(model, None) for model in models],
        base=None if base is None else str(base),
        out_type="Q8_0",
        finder=STREAMS,
        parameters=settings,
    )
    return merge(recipe, output, threads=2).sha256


def at(server: FileServer, path: str) -> str:
    return f"{server.url}/{Path(path).name}"


def test_a_merge_of_files_on_a_server_has_the_bytes_of_one_from_disk(
    server: FileServer, models: dict[str, str], tmp_path: Path
) -> None:
    here = [models["a"], models["b"]]
    wanted = merged(here, tmp_path / "here.gguf")
    assert merged([at(server, one) for one in here], tmp_path / "there.gguf") == wanted


def test_a_directory_on_a_server_is_read_as_one_on_this_machine(
    models_dir: Path, server: FileServer, tmp_path: Path
) -> None:
    server.folder = models_dir
    names = ["expert-a", "expert-b"]
    base = models_dir / "base"
    wanted = merged([str(models_dir / n) for n in names], tmp_path / "here.gguf", "ties", base=base)
    there = [f"{server.url}/{name}" for name in names]
    found = merged(there, tmp_path / "there.gguf", "ties", base=f"{server.url}/base/")
    assert found == wanted
    assert not server.asked("pytorch_model.bin")


def test_a_split_file_is_read_from_all_its_parts(
    server: FileServer, models: dict[str, str], tmp_path: Path
) -> None:
    whole = make_recipe("passthrough", [(models["a"], None)], out_type="keep")
    merge(whole, server.folder / "part.gguf", split_bytes=60_000)
    first = next(server.folder.glob("part-00001-of-*.gguf"))
    wanted = merged([str(first)], tmp_path / "here.gguf", "passthrough")
    assert merged([at(server, str(first))], tmp_path / "there.gguf", "passthrough") == wanted
    last = max(server.folder.glob("part-*.gguf"))
    last.unlink()
    with pytest.raises(FormatError, match=f"{last.name}: is not there"):
        merged([at(server, str(first))], tmp_path / "none.gguf", "passthrough")


def test_a_recipe_names_models_by_their_addresses_and_none_has_a_secret(
    server: FileServer, models: dict[str, str], tmp_path: Path
) -> None:
    secret = "Basic dXNlcjpwQHNz"
    server.login = secret
    address = server.url.replace("//", "//user:p%40ss@") + "/{}.gguf?token=s3cret"
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n"
        + "".join(
            f"  - model: {address.format(one)}\n    parameters: {{weight: 1}}\n" for one in "ab"
        )
        + "dtype: float16\n"
    )
    report = merge(load_recipe(recipe, finder=STREAMS), tmp_path / "out.gguf")
    made = (tmp_path / "out.gguf").read_bytes()
    assert all(login == secret for *_, login in server.requests)
    for word in (b"s3cret", b"p%40ss", b"p@ss", b"dXNlcjpwQHNz", b"127.0.0.1"):
        assert word not in made
        assert word.decode() not in repr(report)
    server.login = "Basic other"
    with pytest.raises(EdgemergeError) as error:
        load_recipe(recipe, finder=STREAMS)
    assert str(error.value) == (
        f"{server.url}/a.gguf: wants a login (401); give it as https://USER:PASSWORD@HOST/, for the hub in "
        "HF_TOKEN"
    )


def test_lost_connections_and_a_restart_change_no_byte(
    server: FileServer, models: dict[str, str], tmp_path: Path
) -> None:
    here = [models["a"], models["b"]]
    wanted = merged(here, tmp_path / "here.gguf")
    server.drop_each = 3
    server.refuse = lambda path, number: 503 if number % 7 == 0 else None
    assert merged([at(server, one) for one in here], tmp_path / "there.gguf") == wanted
    server.drop_each = 0
    server.refuse = lambda path, number: None
    server.requests.clear()
    merged([at(server, one) for one in here], tmp_path / "whole.gguf")
    most = len(server.requests) - 3  # so that a tensor is finished before
    server.refuse = lambda path, number: 503 if number > most else None
    server.requests.clear()
    with pytest.raises(
        FormatError, match=r"could not be read in 4 tries \(the server answers 503\)"
    ):
        merged([at(server, one) for one in here], tmp_path / "none.gguf")
    assert not (tmp_path / "none.gguf").exists()
    server.refuse = lambda path, number: None
    recipe = make_recipe(
        "linear", [(at(server, one), None) for one in here], out_type="Q8_0", finder=STREAMS
    )
    again = merge(recipe, tmp_path / "none.gguf", threads=2)
    assert again.sha256 == wanted
    assert again.resumed_tensors > 0


def test_a_stop_while_heads_are_aligned_is_heard_at_once(
    models_dir: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the stop waited for who tried to read, which may be for minutes."""
    server.folder = models_dir
    source = open_model(STREAMS.find_model(f"{server.url}/base/"))
    source.metadata()  # which reads a header, before threads read tensors
    monkeypatch.setattr(failures, "DELAYS", (PATIENCE, PATIENCE))
    is_told = threading.Event()

    def refuse(_path: str, _number: int) -> int:
        if not is_told.is_set():
            is_told.set()
            os.kill(os.getpid(), signal.SIGINT)
        return 503

    server.refuse = refuse
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            align_models(source, source, arena_bytes=64 << 20)
    finally:
        signal.signal(signal.SIGINT, before)
        source.close()
    assert time.monotonic() - started < PATIENCE


def test_a_file_that_changes_is_not_merged(
    server: FileServer, models: dict[str, str], tmp_path: Path
) -> None:
    recipe = make_recipe("linear", [(at(server, models["a"]), None)], finder=STREAMS)
    with Path(models["a"]).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(FormatError, match=r"a\.gguf: was changed on the server while it was read"):
        merge(recipe, tmp_path / "out.gguf")


def test_what_cannot_be_read_is_one_sentence(server: FileServer, models: dict[str, str]) -> None:
    def refusal(text: str) -> str:
        with pytest.raises(EdgemergeError) as error:
            open_model(STREAMS.find_model(text))
        return str(error.value)

    assert refusal(f"{server.url}/none.gguf?x=y") == (
        f"{server.url}/none.gguf: is not there (404); check the address"
    )
    assert refusal(f"{server.url}/none").endswith(
        "/none: is no model folder: it has no config.json; give the address of a GGUF file or of a Hugging "
        "Face directory"
    )
    assert "give the address of its folder" in refusal(f"{server.url}/model.safetensors")
    assert refusal("ftp9://host/a.gguf").startswith("an address begins with ftp9://")
    server.ranges = False
    assert "does not send ranges of bytes" in refusal(f"{server.url}/a.gguf")
    (server.folder / "empty.gguf").touch()
    server.ranges = True
    assert refusal(f"{server.url}/empty.gguf").endswith("empty.gguf: is empty; get another")
    (server.folder / "text.gguf").write_text("<html>")
    assert "is a web page, not a model" in refusal(f"{server.url}/text.gguf")
    server.redirects["/gone.gguf"] = "/none.gguf"
    assert refusal(f"{server.url}/gone.gguf").endswith("is not there (404); check the address")
    server.redirects["/loop.gguf"] = "/loop.gguf"
    assert "from one address to the next" in refusal(f"{server.url}/loop.gguf")
    unused = refusal("http://127.0.0.1:9/a.gguf")
    assert unused.startswith("http://127.0.0.1:9/a.gguf: could not be read in 3 tries (Connection")
    with pytest.raises(EdgemergeError, match="merge, plan, convert, inspect and verify alone"):
        Finder().find_model(f"{server.url}/a.gguf")


@pytest.mark.parametrize(
    "shard",
    ["a\0.safetensors", "\ud800.safetensors", "a\n.safetensors", "x" * 250 + ".safetensors"],
)
def test_names_of_shards_that_no_file_has_are_one_sentence(server: FileServer, shard: str) -> None:
    folder = server.folder / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FormatError, match=r"index\.json: .* is not a plain \*\.safetensors file name"
    ):
        STREAMS.find_model(f"{server.url}/folder")


def test_an_index_of_a_hostile_server_takes_little_memory(server: FileServer) -> None:
    folder = server.folder / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = folder / "model.safetensors.index.json"
    for raw, said in (
        (b'{"a":[' + b"[]," * 5_000_000 + b"1]}", "holds more than 250000 JSON values"),
        (b'{"a":"' + b"x" * 25_000_000 + b'"}', "is larger than 24 MB"),
    ):
        index.write_bytes(raw)
        with pytest.raises(FormatError, match=f"{server.url}/folder/{index.name}: {said}"):
            bounded(lambda: STREAMS.find_model(f"{server.url}/folder"))


def test_a_link_that_ran_out_is_asked_for_anew(
    server: FileServer, models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copy(models["a"], server.folder / "signed.gguf")
    server.redirects["/once.gguf"] = "/signed.gguf?signature=1"
    wanted = merged([models["a"]], tmp_path / "here.gguf")
    refused: list[int] = []

    def refuse(path: str, number: int) -> int | None:
        if path == "/signed.gguf" and number >= 7 and not refused:
            refused.append(number)
            return 403
        return None

    server.refuse = refuse
    shutil.move(models["a"], server.folder / "other")
    server.redirects["/a.gguf"] = "/signed.gguf?signature=1"
    assert merged([f"{server.url}/a.gguf"], tmp_path / "there.gguf") == wanted
    assert refused


def test_a_server_is_trusted_by_the_certificate_that_is_named(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "FIRST_DELAYS", ())
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    wanted = merged([models["a"]], tmp_path / "here.gguf")
    bundle, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bundle, key)
    with serve_folder(tmp_path / "models", context=context) as server:
        try:
            with pytest.raises(FormatError, match=r"has a certificate that is not trusted \(self-"):
                STREAMS.find_model(f"{server.url}/a.gguf")
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
            assert merged([f"{server.url}/a.gguf"], tmp_path / "there.gguf") == wanted
            server.redirects["/b.gguf"] = "http://127.0.0.1/a.gguf"
            with pytest.raises(FormatError, match="is not encrypted"):
                STREAMS.find_model(f"{server.url}/b.gguf")
        finally:
            stand_ins.remove_all()


def test_who_stops_a_merge_does_not_wait_for_its_servers(
    server: FileServer, models: dict[str, str], tmp_path: Path
) -> None:
    recipe = make_recipe(
        "linear", [(at(server, models[one]), None) for one in "ab"], finder=STREAMS
    )
    server.refuse = lambda path, number: None if number < 14 else server.pause.clear()
    asked_at: list[float] = []

    def stop(done: int, total: int) -> None:
        if not server.pause.is_set():
            asked_at.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out.gguf", threads=2, progress=stop)
    assert time.monotonic() - asked_at[0] < 10  # of the 30 s that a server may be silent
    server.refuse = lambda path, number: None
    server.pause.set()
    assert merge(recipe, tmp_path / "out.gguf", threads=2).resumed_tensors >= 0


def test_a_merge_of_files_here_loads_nothing_that_talks_to_servers(
    models: dict[str, str], tmp_path: Path
) -> None:
    line = (
        "import sys; from edgemerge import merge; from edgemerge.recipe.recipe import make_recipe; "
        "merge(make_recipe('passthrough', [(sys.argv[1], None)]), sys.argv[2]); "
        "assert not {'ssl', 'http.client', 'urllib.request'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", line, models["a"], str(tmp_path / "out.gguf")]
    subprocess.run(command, check=True)


def test_an_adapter_on_a_server_is_added_to_a_model_there(
    server: FileServer, tmp_path: Path
) -> None:
    model = shutil.copytree(ARCHITECTURES / "llama", server.folder / "llama")
    adapter = write_adapter(next(iter(KINDS.values())), server.folder / "adapter")
    wanted = merged([f"{model}+0.5*{adapter}"], tmp_path / "here.gguf", "passthrough")
    there = f"{server.url}/llama+0.5*{server.url}/adapter"
    assert merged([there], tmp_path / "there.gguf", "passthrough") == wanted
    sums = set()
    for one, other in ((model, adapter), there.split("+0.5*")):
        table = {"model": {"path": str(one)}, "lora": {"path": str(other), "weight": 0.5}}
        recipe = tmp_path / "recipe.yml"
        recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": table}]}))
        report = merge(load_recipe(recipe, finder=STREAMS), tmp_path / "again.gguf", force=True)
        sums.add(report.sha256)
    assert len(sums) == 1


def test_a_proxy_is_asked_where_the_usual_variables_name_one(
    server: FileServer, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    address = "http://models.invalid/a.gguf"
    assert open_model(STREAMS.find_model(address)).specs()
    assert set(server.hosts) == {"models.invalid"}
    monkeypatch.setenv("no_proxy", "models.invalid")
    with pytest.raises(FormatError, match="its name cannot be resolved"):
        STREAMS.find_model(address)
