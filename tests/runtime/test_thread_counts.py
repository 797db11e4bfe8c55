"""Thread counts are measured once, kept, and believed for a week."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import OutputError
from edgemerge.runtime import thread_counts
from edgemerge.runtime.llama import Model
from edgemerge.runtime.thread_counts import ThreadCounts, find_threads, kept_counts
from tests.support.tiny_gguf import write_tiny_gguf


class FakeLlama:
    """llama.cpp whose speed depends on threads: answers like one, prompts like all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads = (0, 0)
        self.now = 0.0
        self.n_decoded = 0
        monkeypatch.setattr("edgemerge.runtime.thread_counts.time.perf_counter", lambda: self.now)

    def llama_set_n_threads(self, _context: object, generate: int, prompt: int) -> None:
        self.threads = (generate, prompt)

    def llama_batch_get_one(self, _tokens: object, n: int) -> int:
        return n

    def llama_n_batch(self, _context: object) -> int:
        return 512

    def llama_decode(self, _context: object, n: int) -> int:
        self.n_decoded += 1
        generate, prompt = self.threads
        self.now += 0.01 * generate if n == 1 else 0.1 / prompt
        return 0

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: None


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def find(api: FakeLlama, n_bytes: int = 1 << 27) -> ThreadCounts:
    return find_threads(api, object(), n_bytes=n_bytes, most=4)


def test_answers_and_prompts_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeLlama(monkeypatch)
    assert find(api) == ThreadCounts(generate=1, prompt=4)
    assert api.threads == (1, 4)


def test_what_was_measured_is_kept_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    find(FakeLlama(monkeypatch))
    second = FakeLlama(monkeypatch)
    assert find(second, (1 << 27) + 5) == ThreadCounts(1, 4)
    assert (second.n_decoded, second.threads) == (0, (1, 4))
    third = FakeLlama(monkeypatch)
    find(third, 1 << 30)
    assert third.n_decoded > 0


def test_it_is_believed_for_a_week(monkeypatch: pytest.MonkeyPatch) -> None:
    find(FakeLlama(monkeypatch))
    later = time.time() + thread_counts.KEPT_SECONDS + 1
    monkeypatch.setattr("edgemerge.runtime.thread_counts.time.time", lambda: later)
    assert kept_counts() == {}


@pytest.mark.parametrize(
    "spoilt", ["", "[]", '{"x": 3}', '{"x": {"at": 1e12, "generate": 0}}', "{"]
)
def test_a_spoilt_file_is_measured_anew(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache" / "edgemerge" / "threads.json"
    path.parent.mkdir(parents=True)
    path.write_text(spoilt)
    assert find(FakeLlama(monkeypatch)) == ThreadCounts(1, 4)
    assert len(json.loads(path.read_text())) == 1


def test_without_a_cache_they_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: nothing ran for a user without a home whose folder in /tmp was somebody else's."""

    def refuse() -> Path:
        raise OutputError("this user has no home", path=Path("/tmp/edgemerge-0"))

    monkeypatch.setattr(thread_counts, "users_cache", refuse)
    assert find(FakeLlama(monkeypatch)) == ThreadCounts(1, 4)
    assert kept_counts() == {}


@pytest.mark.llama
def test_a_model_measures_unless_told(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    with Model(path, n_threads=1) as model, model.context(32, n_batch=32):
        assert model.threads == ThreadCounts(1, 1)
    assert kept_counts() == {}
    with Model(path) as model, model.context(32, n_batch=32) as context:
        assert context.n_ctx >= 32
        assert list(kept_counts().values()) in ([model.threads], [])  # [] where there is one core


@pytest.mark.llama
def test_a_context_smaller_than_the_batch_is_measured(tmp_path: Path) -> None:
    """llama.cpp cuts the batch to the context, and ends the process at a larger one."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    code = (
        "import sys; from pathlib import Path; from edgemerge.runtime import llama\n"
        "llama.default_threads = lambda: 2\n"
        "with llama.Model(Path(sys.argv[1])) as model, model.context(8, n_batch=512): pass"
    )
    ended = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
