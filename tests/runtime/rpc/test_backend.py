"""What is asked of a worker before ggml connects, where nothing can be told any more."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.rpc import backend


def test_where_nobody_listens_the_remedy_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    remedy = f"edgemerge rpc-worker --listen {address}"
    with pytest.raises(RuntimeFailure, match=f"there is no rpc worker at .*{remedy}"):
        backend._check_free(address)


def test_a_worker_that_serves_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel connects; nobody accepts
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(RuntimeFailure, match="it computes for one process at a time"):
            backend._check_free(address)


def test_a_library_without_the_backend_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "version", lambda _: "0.3.36")
    with pytest.raises(
        RuntimeFailure, match=r"make rpc, else CMAKE_ARGS=-DGGML_RPC=ON pip install --no-deps "
    ) as error:
        backend.load_backend(_library(tmp_path))
    assert str(error.value).endswith(" llama-cpp-python==0.3.36")


def test_a_backend_of_another_version_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: what `make rpc` made stayed beside a new llama.cpp, and was taken for its own."""
    monkeypatch.setattr(backend, "version", lambda _: "0.3.36")
    (tmp_path / "libggml-rpc.so.0.3.35").touch()
    assert not backend.has_backend(_library(tmp_path))
    (tmp_path / "libggml-rpc.so.0.3.36").touch()
    assert backend.has_backend(_library(tmp_path))


@pytest.mark.llama
def test_a_backend_of_another_build_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "libggml-rpc.so").write_bytes(b"no library")
    with pytest.raises(RuntimeFailure, match="delete it, and make it again with make rpc"):
        backend.load_backend(_library(tmp_path))


def test_connections_are_looked_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert backend.keep_alive([address]) == 1
        with socket.create_connection(server.getsockname()) as link, server.accept()[0] as other:
            assert _is_kept_alive(other)  # as the one that listens
            assert not _is_kept_alive(link)
            assert backend.keep_alive([address]) == 3
            assert _is_kept_alive(link)


def _is_kept_alive(link: socket.socket) -> bool:
    return bool(link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))


def _library(folder: Path) -> Any:
    llama = SimpleNamespace(_lib=SimpleNamespace(_name=str(folder / "libllama.so")))
    return SimpleNamespace(api=SimpleNamespace(llama_cpp=llama))
