from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers that llama.cpp loads, in float32."""
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
