"""`edgemerge serve --require-signature`: what is not signed is neither loaded nor served."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from edgemerge.errors import VerificationError
from edgemerge.provenance.keys import create_keys, read_private_key
from edgemerge.provenance.signature import sign_model, signature_path
from edgemerge.runtime.llama import Lora
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.models import ModelFile
from edgemerge.runtime.serve.signed import SignedLoader
from edgemerge.runtime.serve.systemd import Service
from tests.cli.test_serve import assert_refused, serve
from tests.runtime.test_llama import write_lora
from tests.support.bits import flip_bit
from tests.support.fake_process import Loader
from tests.support.serving import Serving
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return create_keys(tmp_path_factory.mktemp("keys") / "ward")


@pytest.fixture
def models(tiny_gguf: Path, tmp_path: Path, keys: tuple[Path, Path]) -> list[Path]:
    """Two signed models."""
    paths = [Path(shutil.copy(tiny_gguf, tmp_path / f"{name}.gguf")) for name in "ab"]
    for path in paths:
        sign_model(path, read_private_key(keys[0]))
    return paths


def file_of(path: Path) -> ModelFile:
    return ModelFile(path.stem, path, 64, 0, 0, {}, 0)


def test_it_loads_what_is_signed_and_looks_each_time(
    models: list[Path], keys: tuple[Path, Path]
) -> None:
    starter = Loader()

    def load() -> None:
        asyncio.run(SignedLoader(starter, keys[1], models[1:])(file_of(models[0])))

    loader = SignedLoader(starter, keys[1], models[1:])
    loader.check(models[0])
    load()
    flip_bit(models[0], 8 * 5000)
    with pytest.raises(VerificationError, match="is not what was signed"):
        loader.check(models[0])
    with pytest.raises(VerificationError, match="is not what was signed"):
        load()
    flip_bit(models[0], 8 * 5000)
    load()
    flip_bit(models[1], 8 * 5000)  # an adapter
    with pytest.raises(VerificationError, match="is not what was signed"):
        load()
    assert starter.alive() == ["a", "a"]


def test_a_file_swapped_while_it_is_loaded_is_closed_again(
    models: list[Path], keys: tuple[Path, Path]
) -> None:
    starter = Loader()

    async def load(file: ModelFile) -> Loaded:
        loaded = await starter(file)
        os.replace(models[1], file.path)
        return loaded

    with pytest.raises(VerificationError, match="changed while it was loaded"):
        asyncio.run(SignedLoader(load, keys[1], ())(file_of(models[0])))
    assert starter.alive() == []


@pytest.mark.llama
def test_the_server_starts_with_signed_models_only(
    models: list[Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    lora = write_lora(tmp_path / "lora.gguf")
    required = ("--require-signature", keys[1], "--port", 0)
    assert_refused(serve(models[0], "--lora", lora, *required), r"lora\.gguf: has no signature")
    signature_path(models[1]).unlink()
    assert_refused(serve(*models, *required), r"b\.gguf: has no signature")
    assert_refused(serve(*models[::-1], *required), r"b\.gguf: has no signature")
    assert_refused(serve(models[0], "--require-signature", keys[0]), "is a private key")
    sign_model(lora, read_private_key(keys[0]))
    with Serving(models[0], "--lora", lora, "--require-signature", keys[1]) as server:
        ask = {"prompt": "x", "max_tokens": 2}
        assert server.post("/v1/completions", ask).status == 200


@pytest.mark.llama
def test_a_model_that_changes_later_is_not_loaded(
    models: list[Path], keys: tuple[Path, Path], tmp_path: Path
) -> None:
    with Serving(*models, "--require-signature", keys[1]) as server:
        write_tiny_gguf(tmp_path / "evil.gguf", seed=5)
        os.replace(tmp_path / "evil.gguf", models[1])
        ask = {"prompt": "x", "max_tokens": 2}
        answer = server.post("/v1/completions", {"model": "b", **ask})
        assert answer.status == 500
        assert "log says why" in answer.error["message"]
        assert "b.gguf: is not what was signed" in server.log()
        assert server.post("/v1/completions", {"model": "a", **ask}).status == 200


def test_the_unit_asks_for_it_too(tmp_path: Path) -> None:
    model, key = tmp_path / "a.gguf", tmp_path / "ward.pub.pem"
    lora = Lora(tmp_path / "l.gguf")
    service = Service(
        models={"a": model}, host="::1", port=1, grace=1.0, loras=[lora], public_key=key
    )
    command = service.command()
    assert command[command.index("--require-signature") + 1] == str(key)
    signatures = [path.with_name(path.name + ".sig") for path in (model, lora.path)]
    assert {key, *signatures} <= set(service.files())
