"""Where the test models lie, and a warm cache for compiled kernels."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from edgemerge.machine.process import ProcessMemory
from edgemerge.native.signatures import SHARED
from tests.support.fixtures import unpacked

if TYPE_CHECKING:
    from tests.support.crashing import Crasher
    from tests.support.llama_quantize import Quantiser

TESTS = Path(__file__).resolve().parent

# Compiling every kernel takes longer than testing it. One stable folder outside the tree keeps the
# next run warm and the tree clean; subprocesses inherit it. Numba reads it when first imported, and does
# not see that a function was changed which another file uses: these are part of the folder's name.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_SOURCES = [TESTS.parent / "kernels" / f"{file}.py" for file in SHARED]
_SHARED = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:8]
os.environ.setdefault("NUMBA_CACHE_DIR", str(_CACHE / "edgemerge" / f"numba-tests-{_SHARED}"))

# Tests interrupt what they start. A job in the background of a script ignores SIGINT, and its children would.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Close two files that llama-cpp-python opens when it is imported: Python would warn of them at exit."""
    if (utils := sys.modules.get("llama_cpp._utils")) is not None:
        utils.outnull_file.close()
        utils.errnull_file.close()


# No time limit for one example or for making them: the first call imports a library, and a machine is shared.
hypothesis.settings.register_profile(
    "edgemerge", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("edgemerge")


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels() -> None:
    """Compile all kernels by a few children, rather than one by one when a test comes to them.

    Where several processes share the tests, the first one compiles, and the others find the files.
    """
    from edgemerge.merging.precompile import precompile_all  # not before NUMBA_CACHE_DIR is set

    lock = Path(os.environ["NUMBA_CACHE_DIR"]) / "tests.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        precompile_all(lambda done, total: None)


@pytest.fixture(scope="session", autouse=True)
def _small_process() -> Iterator[None]:
    """Count this process as a fresh one: tests of budgets would depend on the tests before them."""
    memory = ProcessMemory(rss=0, peak=0, file=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgemerge.budget.read_process", lambda: memory)
        yield


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder of the real models: base, expert-a, expert-b (safetensors directories)."""
    return unpacked("models")


@pytest.fixture(scope="session")
def eval_dir() -> Path:
    """Held-out questions: disease.jsonl, substance.jsonl, general.jsonl."""
    return unpacked("models") / "eval"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs, recipes, masks and outputs of mergekit."""
    return unpacked("golden")


@pytest.fixture(scope="session")
def quantiser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quantiser]:
    """llama_model_quantize, silent."""
    llama = pytest.importorskip("llama_cpp")
    from tests.support.llama_quantize import Quantiser  # imports gguf, which not every machine has

    logger = logging.getLogger("llama-cpp-python")  # its level decides what llama.cpp may print
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield Quantiser(llama, tmp_path_factory.mktemp("quantised"))
    logger.setLevel(level)


@pytest.fixture(scope="session")
def crasher() -> Iterator[Crasher]:
    """Runs merges that die where they are told to."""
    from tests.support.crashing import crash_server

    with crash_server() as server:
        yield server


@pytest.fixture(scope="session")
def crash_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models for it: base, a, b."""
    from tests.support.crashing import write_models

    return write_models(tmp_path_factory.mktemp("crash-models"))


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: its syncs take no time."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix="edgemerge-tests-", dir=parent) as name:
        yield Path(name)
