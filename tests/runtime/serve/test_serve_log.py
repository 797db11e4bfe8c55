"""`serve --log`: what is written of a request, and what is not."""

from __future__ import annotations

import hashlib
import json
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import Serving, make_served_gguf

pytestmark = pytest.mark.llama

ASKED = {"prompt": "Once upon", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def gguf(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_gguf(models_dir, tmp_path_factory.mktemp("served") / "base.gguf")


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    assert answered["sha256"] == hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert answered["answer_tokens"] == 3
    assert answered["prompt_tokens"] > 0
    assert answered["seconds"] > 0
    age = datetime.now(UTC) - datetime.fromisoformat(answered["time"])
    assert 0 <= age.total_seconds() < 600
    assert (refused["status"], refused["answer_tokens"]) == (400, None)
    assert "Once upon" not in log.read_text()


def test_prompts_are_logged_when_asked_for_and_users_are_told(gguf: Path, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    log.write_text('{"earlier": true}\n')
    with Serving(gguf, "--log", log, "--log-prompts") as server:
        assert server.post("/v1/completions", ASKED).status == 200
        assert server.get("/health").json["logs_prompts"] is True
    earlier, answered = entries(log)
    assert earlier == {"earlier": True}
    assert answered["request"] == {"prompt": "Once upon"}
