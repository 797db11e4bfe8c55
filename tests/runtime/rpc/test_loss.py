"""A lost worker: one sentence that names it, and nothing of ggml's."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from edgemerge.runtime.rpc import loss
from edgemerge.runtime.rpc.loss import explain, read_last_words

CRASHED = "ggml-rpc.cpp:566: Remote RPC server crashed or returned malformed response"
ABORTING = """
import ctypes, sys
from edgemerge.runtime.library import load_library
from edgemerge.runtime.rpc.loss import watch
ggml = ctypes.CDLL(load_library().api.llama_cpp._lib._name)
watch(ggml, sys.argv[2:])
ggml.ggml_abort(b"ggml-rpc.cpp", 566, sys.argv[1].encode())
"""


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_the_worker_that_is_gone_is_named(listening: str, closed: str) -> None:
    assert explain(CRASHED, [listening, closed]) == (
        f"the rpc worker at {closed} is gone: start it again with edgemerge rpc-worker"
    )


def test_where_all_listen_all_are_named(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_END_SECONDS", 0.1)
    assert f"{listening} broke the connection" in explain(CRASHED, [listening])
    handshake = explain("RPC handshake failed for x", [listening])
    assert "another version" in handshake
    assert "the same llama-cpp-python on all boards" in handshake


def test_a_worker_that_is_still_ending_is_found(
    listening: str, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([True, True, True, False])  # both twice
    monkeypatch.setattr(loss, "_listens", lambda address: next(answers))
    assert f"{closed} is gone" in explain(CRASHED, [listening, closed])


def test_last_words_are_the_last_line() -> None:
    assert read_last_words("something\nedgemerge: it is gone\n") == "it is gone"
    assert read_last_words("edgemerge: a\nGGML_ASSERT") is None
    assert read_last_words("") is None


@pytest.mark.llama
def test_the_process_ends_with_one_sentence(closed: str) -> None:
    ended = _abort("Remote RPC server crashed or returned malformed response", closed)
    assert ended.returncode == 1
    assert read_last_words(ended.stderr) == explain(CRASHED, [closed])
    assert ended.stderr.count("\n") == 1


@pytest.mark.llama
def test_other_assertions_abort_as_ever(closed: str) -> None:
    ended = _abort("GGML_ASSERT(n > 0) failed", closed)
    assert ended.returncode == -signal.SIGABRT
    assert "GGML_ASSERT(n > 0) failed" in ended.stderr
    assert read_last_words(ended.stderr) is None


def _abort(message: str, *addresses: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ABORTING, message, *addresses]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
