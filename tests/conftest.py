"""Where the test models lie, and a warm cache for compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# Compiling every kernel takes longer than testing it. One stable folder outside the tree keeps the
# next run warm and the tree clean; subprocesses inherit it. Numba reads it when first imported.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("NUMBA_CACHE_DIR", str(_CACHE / "edgemerge" / "numba-tests"))


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder of the real models: base, expert-a, expert-b (safetensors directories)."""
    return TESTS / "models"


@pytest.fixture(scope="session")
def eval_dir() -> Path:
    """Held-out questions: disease.jsonl, substance.jsonl, general.jsonl."""
    return TESTS / "models" / "eval"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs, recipes, masks and outputs of mergekit."""
    return TESTS / "data" / "golden"
