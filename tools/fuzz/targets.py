"""What is fuzzed: the readers of files that come from strangers, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.fuzz.adapter import read_adapter
from tools.fuzz.directory import read_directory
from tools.fuzz.gguf_file import read_gguf
from tools.fuzz.imatrix_file import read_imatrix
from tools.fuzz.recipe import read_recipe
from tools.fuzz.registry import read_registry
from tools.fuzz.safetensors_file import read_safetensors

__all__ = ["TARGETS"]

# Each takes an input and an empty folder of its own; it returns, or raises one of our own errors.
TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "gguf": read_gguf,
    "safetensors": read_safetensors,
    "imatrix": read_imatrix,
    "directory": read_directory,
    "recipe": read_recipe,
    "adapter": read_adapter,
    "registry": read_registry,
}
