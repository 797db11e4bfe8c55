"""The quantiser of llama.cpp for the tests of this folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.llama_quantize import Quantiser


@pytest.fixture(scope="session")
def quantiser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quantiser]:
    llama = pytest.importorskip("llama_cpp")
    logger = logging.getLogger("llama-cpp-python")  # its level decides what llama.cpp may print
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield Quantiser(llama, tmp_path_factory.mktemp("filetypes"))
    logger.setLevel(level)
