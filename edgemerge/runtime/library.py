"""llama.cpp in this process: loaded once, silent, its log kept for errors and for memory figures."""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from edgemerge.errors import RuntimeFailure

__all__ = ["Buffers", "Library", "load_library"]

_LOG_LINES = 20
_WARNING, _ERROR = 3, 4  # enum ggml_log_level of ggml.h
# "llama_kv_cache:        CPU KV buffer size =    45.00 MiB": llama.cpp tells its memory in the log only
_BUFFER = re.compile(r"(model|KV|RS|compute|output|LoRA) buffer size = +([0-9.]+) MiB")


@dataclass(frozen=True, slots=True)
class Buffers:
    """Memory that llama.cpp says it uses, in bytes (its log rounds to 0.01 MiB).

    Attributes
    ----------
    weights : int
        Tensors of the model and of its LoRA adapters, mapped or copied, on all devices.
    kv : int
        Key-value cache, or the state of a recurrent model.
    compute : int
        Scratch of the computation.
    output : int
        Logits of one batch.
    """

    weights: int = 0
    kv: int = 0
    compute: int = 0
    output: int = 0


@dataclass(frozen=True, slots=True)
class Library:
    """llama.cpp in this process: one log, one backend.

    Attributes
    ----------
    api : module
        `llama_cpp`.
    log : deque of (int, str)
        Level and text of the last warnings and errors.
    """

    api: Any
    log: deque[tuple[int, str]]
    callback: object  # C holds the pointer only; this keeps the function alive
    _sizes: dict[str, int] = field(default_factory=dict)

    def start(self) -> None:
        """Forget the log, before something that may fail or that tells its buffers."""
        self.log.clear()
        self._sizes.clear()

    def buffers(self) -> Buffers:
        """Memory that was announced since `start`."""
        sizes = self._sizes.get
        return Buffers(
            weights=sizes("model", 0) + sizes("LoRA", 0),
            kv=sizes("KV", 0) + sizes("RS", 0),
            compute=sizes("compute", 0),
            output=sizes("output", 0),
        )

    def failure(self, message: str) -> RuntimeFailure:
        """Make an error that carries what llama.cpp said; its first complaint is the cause."""
        lines = "".join(text for _, text in self.log).splitlines()
        errors = [text.strip() for level, text in self.log if level == _ERROR]
        reason = f" ({errors[0]})" if errors else ""
        return RuntimeFailure(f"{message}{reason}", detail="\n".join(lines))


@cache
def load_library() -> Library:
    """Load llama.cpp and take over its log.

    Raises
    ------
    RuntimeFailure
        llama-cpp-python is not installed, or its shared library does not load.
    """
    # OpenMP's default is to spin while it waits: on a board with anything else to do, generation
    # fell from 25 to 0.8 tokens/s. libgomp reads this once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import llama_cpp
    except ImportError as error:
        raise RuntimeFailure(
            "running a model needs llama.cpp: install it with pip install 'edgemerge[run]'"
        ) from error
    except (OSError, RuntimeError) as error:  # its shared library is there and does not load
        raise RuntimeFailure(
            f"llama.cpp does not load ({error}): install it again with "
            "pip install --force-reinstall --no-cache-dir 'edgemerge[run]'",
            detail=str(error),
        ) from error
    log: deque[tuple[int, str]] = deque(maxlen=_LOG_LINES)
    sizes: dict[str, int] = {}

    def keep(level: int, text: bytes, user_data: object) -> None:
        line = text.decode("utf-8", errors="replace")
        if level in (_WARNING, _ERROR):
            log.append((level, line))
        elif found := _BUFFER.search(line):
            kind, size = found.groups()
            sizes[kind] = sizes.get(kind, 0) + round(float(size) * 2**20)

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return Library(llama_cpp, log, callback, sizes)
