"""Addresses that fsspec knows beside s3 and sftp, by a store of this machine's files that often fails."""

from __future__ import annotations

import ftplib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgemerge import merge
from edgemerge.cli import make_app
from edgemerge.errors import EdgemergeError, FormatError, OutputError
from edgemerge.finding.finder import Finder
from edgemerge.recipe.recipe import make_recipe
from edgemerge.remote import failures, stand_ins
from edgemerge.remote.stores.address import read_store_address
from edgemerge.remote.stores.file import fetch_small
from edgemerge.remote.stores.link import StoreLink
from tests.support.crashing import write_models

fsspec = pytest.importorskip("fsspec")
STREAMS = Finder(streams=True)
LOGIN = ("nurse", "s3cret")


class FailingStore(fsspec.AbstractFileSystem):  # type: ignore[misc,name-defined]
    """Files of this machine; every `fails_each`th question fails, with the password in its text."""

    protocol = "teststore"
    fails_each = 0
    n_asked = 0
    tags: bool = True

    def __init__(self, username: str = "", password: str = "", **settings: object) -> None:
        super().__init__(**settings)
        if username == "guest":
            raise ftplib.error_perm(f"530 {password}")
        if (username, password) not in (LOGIN, ("", "")):
            raise PermissionError(13, "Permission denied")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("teststore://store")

    def count(self) -> None:
        kind = type(self)
        kind.n_asked += 1
        if kind.fails_each and kind.n_asked % kind.fails_each == 0:
            raise RuntimeError("https://store/?password=s3cret did not answer")

    def info(self, path: str, **settings: object) -> dict[str, Any]:
        self.count()
        path = self._strip_protocol(path)
        found = os.stat(path)
        kind = "directory" if os.path.isdir(path) else "file"
        tag = {"etag": str(found.st_mtime_ns)} if self.tags else {}
        return {"name": path, "size": found.st_size, "type": kind, **tag}

    def _open(self, path: str, mode: str = "rb", **settings: object) -> _File:
        self.count()
        return _File(path, self)


class _File:
    def __init__(self, path: str, store: FailingStore) -> None:
        self.file, self.store = open(path, "rb"), store  # noqa: SIM115

    def seek(self, offset: int) -> None:
        self.file.seek(offset)

    def readinto(self, view: memoryview) -> int:
        self.store.count()
        return self.file.readinto(view[:100_000])

    def close(self) -> None:
        self.file.close()


@pytest.fixture(name="store", autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FailingStore]]:
    fsspec.register_implementation("teststore", FailingStore, clobber=True)
    monkeypatch.setattr(failures, "DELAYS", (0.0, 0.01, 0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr(failures, "FIRST_DELAYS", (0.0, 0.01))
    monkeypatch.setattr(FailingStore, "fails_each", 0)
    monkeypatch.setattr(FailingStore, "tags", True)
    yield FailingStore
    stand_ins.remove_all()


@pytest.fixture(name="models")
def _models(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_models(folder)


def merged(models: list[str], output: Path) -> str:
    recipe = make_recipe(
        "linear", [(model, None) for model in models], out_type="Q8_0", finder=STREAMS
    )
    return merge(recipe, output, threads=2).sha256


def test_a_merge_has_the_bytes_of_one_from_disk_however_often_the_store_fails(
    store: type[FailingStore], models: dict[str, str], models_dir: Path, tmp_path: Path
) -> None:
    here = [models["a"], models["b"]]
    wanted = merged(here, tmp_path / "here.gguf")
    folder = merged([str(models_dir / "expert-a")], tmp_path / "folder.gguf")
    store.fails_each = 7
    there = [f"teststore://nurse:s3cret@store{one}" for one in here]
    assert merged(there, tmp_path / "there.gguf") == wanted
    assert b"s3cret" not in (tmp_path / "there.gguf").read_bytes()
    there = [f"teststore://store{models_dir}/expert-a"]
    assert merged(there, tmp_path / "folder-there.gguf") == folder


def test_plan_says_what_comes_over_the_network(models: dict[str, str]) -> None:
    there = [f"teststore://nurse:s3cret@store{models[name]}" for name in "ab"]
    result = CliRunner().invoke(make_app(), ["plan", *there, "-m", "linear", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert document["network_bytes"] == document["read_bytes"] > 0
    assert document["models"] == [f"teststore://store{models[name]}" for name in "ab"]
    assert "s3cret" not in result.output


def test_what_is_spilled_is_not_read_again(
    store: type[FailingStore], models: dict[str, str], tmp_path: Path
) -> None:
    finder = Finder(streams=True, spill=tmp_path)
    path = finder.find_model(f"teststore://store{models['a']}")
    remote = stand_ins.find_remote(path)
    assert remote is not None
    raw = bytearray(1000)
    for _ in range(3):
        remote.fill([memoryview(raw)], 10, (0, 5000))
        assert raw == Path(models["a"]).read_bytes()[10:1010]
    n_asked = store.n_asked
    remote.fill([memoryview(raw)], 10, (0, 5000))
    assert store.n_asked == n_asked
    remote.forget(0, 5000)
    remote.fill([memoryview(raw)], 10, (0, 5000))
    assert store.n_asked > n_asked


def test_what_cannot_be_read_is_one_sentence_without_a_password(
    store: type[FailingStore], models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(text: str) -> str:
        with pytest.raises(EdgemergeError) as error:
            STREAMS.find_model(text)
        assert "s3cret" not in str(error.value)
        return str(error.value)

    address = f"teststore://nurse:s3cret@store{models['a']}"
    shown = f"teststore://store{models['a']}"
    assert refusal(address.replace("nurse", "other")).endswith("may not be read; check your access")
    assert refusal(address.replace("nurse", "guest")).endswith("may not be read; check the login")
    assert refusal(f"{address}x.gguf").endswith("x.gguf: is not there; check the address")
    store.fails_each = 1
    assert refusal(address) == (
        f"{shown}: could not be read in 3 tries (RuntimeError); see to the network and give the same "
        "command again"
    )
    for scheme in ("file", "memory", "reference", "zip"):
        assert refusal(f"{scheme}://x/a.gguf").startswith(
            f"an address begins with {scheme}://, which"
        )
    assert refusal("nosuch://x/a.gguf").startswith("an address begins with nosuch://, which fsspec")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "gs://bucket/a.gguf cannot be read: " in refusal("gs://bucket/a.gguf")
    monkeypatch.setitem(sys.modules, "paramiko", None)
    monkeypatch.delitem(sys.modules, "edgemerge.remote.stores.sftp", raising=False)
    assert refusal("sftp://user:s3cret@host/a.gguf") == (
        "sftp://host/a.gguf cannot be read: paramiko is missing: pip install 'edgemerge[remote]'"
    )
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert refusal("ftp://host/a.gguf").endswith(
        "fsspec is missing: pip install 'edgemerge[remote]'"
    )


def test_a_full_disk_is_told(models: dict[str, str], tmp_path: Path) -> None:
    address = read_store_address(f"teststore://store{models['a']}")
    (tmp_path / "full").symlink_to("/dev/full")
    link = StoreLink(address)
    with pytest.raises(OutputError, match=r"cannot hold what is fetched \(No space left on device"):
        fetch_small(link, address, tmp_path / "full", 1 << 20)
    link.close()


def test_a_package_that_is_missing_is_named_for_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemerge.remote.stores.signing.find_spec", lambda name: None)
    with pytest.raises(EdgemergeError) as error:
        STREAMS.find_model("s3://AKID:s3cret@bucket/a.gguf")
    assert str(error.value) == ("s3://bucket/a.gguf needs s3fs: pip install 'edgemerge[remote]'")


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_changes_is_not_merged(
    store: type[FailingStore], models: dict[str, str], tmp_path: Path, tags: bool
) -> None:
    store.tags = tags
    recipe = make_recipe("linear", [(f"teststore://store{models['a']}", None)], finder=STREAMS)
    with Path(models["a"]).open("ab") as file:
        file.write(b"more")
    with pytest.raises(FormatError, match=r"a\.gguf: was changed on the server while it was read"):
        merge(recipe, tmp_path / "out.gguf")


def test_a_mixture_of_two_versions_is_not_kept(
    store: type[FailingStore],
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file changes after it was opened, which no read of the store shows."""
    there, read = Path(models["a"]), _File.readinto

    def change_and_read(file: _File, view: memoryview) -> int:
        os.utime(there, ns=(0, 0))
        return read(file, view)

    monkeypatch.setattr(_File, "readinto", change_and_read)
    finder = Finder(streams=True, keep=tmp_path / "kept")
    with pytest.raises(FormatError, match=r"a\.gguf: was changed on the server while it was read"):
        finder.find_model(f"teststore://store{there}")
    assert [path for path in (tmp_path / "kept").rglob("*") if path.is_file()] == []


def test_addresses_are_read_and_shown_without_their_secrets() -> None:
    address = read_store_address("S3://KEY:a%2Fb%40c@bucket/folder/model.gguf?versionId=7")
    assert (
        str(address) == repr(address)[len("StoreAddress(") : -1] == "s3://bucket/folder/model.gguf"
    )
    assert address.login == ("KEY", "a/b@c")
    assert str(address.beside("x y.gguf")) == "s3://bucket/folder/x y.gguf"
    assert str(address.inside("config.json")).endswith("model.gguf/config.json")
    assert (address.name, address.query, address.inside("x").query) == (
        "model.gguf",
        "versionId=7",
        "",
    )
    assert str(read_store_address("sftp://[::1]:2222/a")) == "sftp://[::1]:2222/a"
    for text in (
        "s3://bucket",
        "s3:///a",
        "s3://b:80/a",
        "sftp://u:1/2@h/a",
        "sftp://h:x/a",
        "s3:/b/a",
    ):
        with pytest.raises(EdgemergeError, match="an address cannot be read"):
            read_store_address(text)
