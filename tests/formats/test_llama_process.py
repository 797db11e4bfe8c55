"""ggml's backends where they are files of their own, as in wheels for many processors."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.formats.llama_process import load_backends

API = SimpleNamespace(
    llama_cpp=SimpleNamespace(_lib=SimpleNamespace(_name="/site/lib/libllama.so"))
)


class Ggml:
    """Stands in for the library: how many backends it has built in, and how many are beside it."""

    def __init__(self, n_built_in: int, n_beside: int) -> None:
        self.folders: list[bytes] = []
        n_loaded = n_built_in

        def load(folder: ctypes.c_char_p) -> None:
            nonlocal n_loaded
            self.folders.append(folder.value or b"")
            n_loaded += n_beside

        self.ggml_backend_reg_count = lambda: n_loaded
        self.ggml_backend_dev_count = lambda: n_loaded
        self.ggml_backend_load_all_from_path = load


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the backends of a stand-in and return it."""

    def load(ggml: Ggml) -> Ggml:
        monkeypatch.setattr(ctypes, "CDLL", lambda path: ggml)
        load_backends(API)
        return ggml

    return load


def test_backends_beside_the_library_are_loaded(loaded: Any) -> None:
    assert loaded(Ggml(0, 1)).folders == [b"/site/lib"]


def test_backends_that_are_built_in_are_left_alone(loaded: Any) -> None:
    assert loaded(Ggml(1, 1)).folders == []


def test_none_for_this_processor_is_one_sentence(loaded: Any) -> None:
    with pytest.raises(RuntimeFailure, match=r"^/site/lib has no code of llama\.cpp for this "):
        loaded(Ggml(0, 0))


@pytest.mark.llama
def test_the_installed_one_has_a_device() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    load_backends(llama_cpp)
    ggml = ctypes.CDLL(llama_cpp.llama_cpp._lib._name)
    assert ggml.ggml_backend_dev_count() >= 1
    assert Path(llama_cpp.llama_cpp._lib._name).is_file()
