"""s3:// addresses, against moto's server in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgemerge import merge
from edgemerge.errors import EdgemergeError, FormatError
from edgemerge.finding.finder import Finder
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.remote import failures, stand_ins
from edgemerge.remote.address import Address, read_address
from edgemerge.remote.file import RemoteFile, probe
from tests.support.crashing import write_models
from tests.support.file_server import serve_folder
from tests.support.remote_merges import merge_in_process, write_large_models, write_shards

for package in ("s3fs", "moto", "flask_cors"):
    pytest.importorskip(package)
from tests.support.s3_server import BUCKET, put_file, serve_s3  # noqa: E402

STREAMS = Finder(streams=True)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("s3") / "bucket"
    folder.mkdir()
    write_models(folder)
    for name in ("expert-a", "expert-b"):
        shutil.copytree(models_dir / name, folder / "sub folder" / name)
    write_shards(models_dir / "base", folder / "shards")
    write_large_models(folder)
    return folder


@pytest.fixture(name="url", scope="module")
def _url(folder: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, serve_s3(folder, patch) as url:
        yield url


@pytest.fixture(autouse=True)
def _clean(url: str) -> Iterator[None]:
    yield
    stand_ins.remove_all()


def merged(models: list[str], output: Path) -> str:
    recipe = make_recipe(
        "linear", [(model, None) for model in models], out_type="Q8_0", finder=STREAMS
    )
    return merge(recipe, output, threads=2).sha256


def test_a_merge_from_a_bucket_has_the_bytes_of_one_from_disk(folder: Path, tmp_path: Path) -> None:
    names = ["a.gguf", "b.gguf"]
    wanted = merged([str(folder / name) for name in names], tmp_path / "here.gguf")
    there = [f"s3://{BUCKET}/{name}" for name in names]
    assert merged(there, tmp_path / "there.gguf") == wanted


def test_directories_are_read_as_on_this_machine(folder: Path, tmp_path: Path) -> None:
    names = ["sub folder/expert-a", "sub folder/expert-b", "shards"]
    wanted = merged([str(folder / name) for name in names], tmp_path / "here.gguf")
    there = [f"s3://{BUCKET}/{name}" for name in names]
    assert merged(there, tmp_path / "there.gguf") == wanted


def test_keys_may_stand_in_the_address_and_are_written_nowhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    address = f"s3://{BUCKET}/a.gguf"
    with pytest.raises(EdgemergeError, match=rf"^{address} needs credentials: set AWS_ACCESS_KEY"):
        STREAMS.find_model(address)
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    with pytest.raises(
        EdgemergeError, match=r"\(The config profile \(nosuch\) could not be found\)"
    ):
        STREAMS.find_model(address)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("FSSPEC_S3_ANON", "1")
    with pytest.raises(EdgemergeError, match=r"may not be read \(403\)"):
        STREAMS.find_model(address)
    monkeypatch.delenv("FSSPEC_S3_ANON")
    secret = f"s3://AKIDHIDDEN:hidden%2Fs3cret@{BUCKET}/a.gguf"
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels: [{{model: '{secret}', parameters: {{weight: 1}}}}]\n"
    )
    kept = tmp_path / "kept"
    for finder in (STREAMS, Finder(streams=True, keep=kept)):
        report = merge(load_recipe(recipe, finder=finder), tmp_path / "out.gguf", force=True)
        made = (tmp_path / "out.gguf").read_bytes()
        for word in ("AKIDHIDDEN", "s3cret", "X-Amz-Signature", "Signature="):
            assert word.encode() not in made
            assert word not in repr(report)
            assert word not in "".join(p.read_text() for p in kept.rglob("*.json"))
    broken = secret.replace("%2F", "/").replace("hidden", "123")
    with pytest.raises(EdgemergeError) as error:
        STREAMS.find_model(broken)
    assert "s3cret" not in str(error.value)


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, url: str) -> None:
    def refusal(text: str) -> str:
        with pytest.raises(EdgemergeError) as error:
            STREAMS.find_model(text)
        return str(error.value)

    assert refusal(f"s3://{BUCKET}/none.gguf") == (
        f"s3://{BUCKET}/none.gguf: is not there (404); check the address"
    )
    assert refusal(f"s3://{BUCKET}/none").startswith(f"s3://{BUCKET}/none: is no model folder")
    assert "give the address of its folder" in refusal(f"s3://{BUCKET}/model.safetensors")
    assert "cannot be read; give one such as s3://BUCKET/KEY" in refusal(f"s3://{BUCKET}")


def test_an_object_that_changes_is_not_merged(folder: Path, url: str, tmp_path: Path) -> None:
    raw = (folder / "a.gguf").read_bytes()
    put_file(url, "changing.gguf", raw)
    recipe = make_recipe("linear", [(f"s3://{BUCKET}/changing.gguf", None)], finder=STREAMS)
    put_file(url, "changing.gguf", raw[:-1] + b"\x01")
    with pytest.raises(FormatError, match=r"^s3://.*changing\.gguf: was changed on the server"):
        merge(recipe, tmp_path / "out.gguf")


def test_the_budget_holds_whatever_s3fs_takes(folder: Path, tmp_path: Path) -> None:
    names = ["large-0.gguf", "large-1.gguf"]
    here = merge_in_process([str(folder / n) for n in names], tmp_path / "here.gguf", "96MiB")
    there = [f"s3://{BUCKET}/{name}" for name in names]
    found = merge_in_process(there, tmp_path / "there.gguf", "96MiB")
    assert found["sha256"] == here["sha256"]
    assert int(found["peak_rss_bytes"]) <= 96 << 20


def test_a_signature_that_ran_out_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "DELAYS", (0.0,))
    raw = bytes(range(256)) * 4096
    (tmp_path / "data").write_bytes(raw)
    with serve_folder(tmp_path) as server:
        signed: list[str] = []

        def sign() -> Address:
            signed.append(f"{len(signed)}")
            plain = read_address(f"{server.url}/data?signature={signed[-1]}")
            return replace(plain, shown="s3://bucket/data", renew=sign)

        file = RemoteFile(sign(), probe(sign()))
        refused: list[int] = []

        def refuse(path: str, number: int) -> int | None:
            if len(refused) < 1 and number > 1:
                refused.append(number)
                return 403
            return None

        server.refuse = refuse
        buffer = bytearray(len(raw))
        file.fill([memoryview(buffer)], 0, (0, 0))
        assert buffer == raw
        assert len(signed) == 3
        server.refuse = lambda path, number: 403
        file.forget(0, len(raw))
        with pytest.raises(FormatError, match=r"^s3://bucket/data: may not be read \(403\)"):
            file.fill([memoryview(buffer)], 0, (0, 0))
        assert len(signed) == 4
        file.close()
