"""`serve --log`: what is written of a request, and what is not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.serve.hashed import HashedLoader
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.models import ModelFile
from tests.support.fake_process import Loader
from tests.support.serving import Serving, make_served_gguf

ASKED = {"prompt": "Once upon", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def gguf(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_gguf(models_dir, tmp_path_factory.mktemp("served") / "base.gguf")


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def file_of(path: Path) -> ModelFile:
    return ModelFile(path.stem, path, 64, 0, 0, {}, 0)


@pytest.mark.llama
def test_a_line_per_request_without_what_was_asked(gguf: Path, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    with Serving(gguf, "--log", log) as server:
        assert server.post("/v1/completions", ASKED).status == 200
        assert server.post("/v1/completions", {"prompt": "x", "n": 70}).status == 400
        assert server.get("/health").json["logs_prompts"] is False
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    answered, refused = entries(log)
    assert answered["route"] == "/v1/completions"
    assert answered["status"] == 200
    assert answered["model"] == "base"
    assert answered["sha256"] == sha256_of(gguf)
    assert answered["answer_tokens"] == 3
    assert answered["prompt_tokens"] > 0
    assert answered["seconds"] > 0
    age = datetime.now(UTC) - datetime.fromisoformat(answered["time"])
    assert 0 <= age.total_seconds() < 600
    assert (refused["status"], refused["answer_tokens"]) == (400, None)
    assert "Once upon" not in log.read_text()


@pytest.mark.llama
def test_prompts_are_logged_when_asked_for_and_users_are_told(gguf: Path, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    log.write_text('{"earlier": true}\n')
    with Serving(gguf, "--log", log, "--log-prompts") as server:
        assert server.post("/v1/completions", ASKED).status == 200
        assert server.get("/health").json["logs_prompts"] is True
    earlier, answered = entries(log)
    assert earlier == {"earlier": True}
    assert answered["request"] == {"prompt": "Once upon"}


@pytest.mark.llama
def test_the_digest_is_of_the_weights_that_answered(
    gguf: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    log, served = tmp_path / "requests.jsonl", Path(shutil.copy(gguf, tmp_path / "served.gguf"))
    new = Path(shutil.copy(tiny_gguf, tmp_path / "new.gguf"))
    old, now = sha256_of(served), sha256_of(new)
    with Serving(served, "--log", log) as server:
        new.replace(served)
        assert server.post("/v1/completions", ASKED).status == 200
        assert server.post("/admin/reload", {"ask": False}).status == 200
        assert server.post("/v1/completions", ASKED).status == 200
        served.unlink()
        assert server.post("/v1/completions", ASKED).status == 200
        server.stop()
        assert server.wait() == 0
    found = [entry["sha256"] for entry in entries(log) if entry["answer_tokens"] is not None]
    assert found == [old, now, now]


def test_a_file_is_hashed_when_it_is_loaded_and_again_when_it_is_another(tmp_path: Path) -> None:
    path, loader = tmp_path / "a.gguf", HashedLoader(Loader())
    for contents in (b"one", b"one", b"other"):
        path.write_bytes(contents)
        loaded = asyncio.run(loader(file_of(path)))
        assert loaded.sha256 == hashlib.sha256(contents).hexdigest()
    path.unlink()
    with pytest.raises(RuntimeFailure, match=r"a\.gguf: cannot be read .*; check the path"):
        asyncio.run(loader(file_of(path)))


@pytest.mark.parametrize("how", ["another", "none"])
def test_a_file_that_changes_while_it_is_loaded_is_closed_again(how: str, tmp_path: Path) -> None:
    path, starter = tmp_path / "a.gguf", Loader()
    path.write_bytes(b"one")

    async def load(file: ModelFile) -> Loaded:
        loaded = await starter(file)
        file.path.unlink()
        if how == "another":
            file.path.write_bytes(b"two")
        return loaded

    with pytest.raises(RuntimeFailure, match=r"a\.gguf: (changed while|cannot be read)"):
        asyncio.run(HashedLoader(load)(file_of(path)))
    assert starter.alive() == []


def test_nobody_waits_for_a_digest_that_is_not_wanted_any_more(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    path.touch()
    os.truncate(path, 16 << 30)  # takes no room, and ten seconds or more to hash

    async def leave() -> None:
        async with asyncio.timeout(0.1):
            await HashedLoader(Loader())(file_of(path))

    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    assert time.monotonic() - begin < 4.0
