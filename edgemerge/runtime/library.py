"""llama.cpp in this process: loaded once, silent, its log kept for errors and for memory figures."""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from edgemerge.errors import RuntimeFailure
from edgemerge.formats.llama_process import load_backends
from edgemerge.machine.process import wait_briefly

__all__ = ["Buffers", "Library", "load_library"]

_LOG_LINES = 20
_GPU_TYPES = (1, 2)  # enum ggml_backend_dev_type of ggml-backend.h; 2 is an integrated one
_WARNING, _ERROR = 3, 4  # enum ggml_log_level of ggml.h
# "llama_kv_cache:        CPU KV buffer size =    45.00 MiB": llama.cpp tells its memory in the log only
_BUFFER = re.compile(r": +(\S+) +(model|KV|RS|compute|output|LoRA) buffer size = +([0-9.]+) MiB")


@dataclass(frozen=True, slots=True)
class Buffers:
    """Memory that llama.cpp says it uses, on all devices.

    Attributes
    ----------
    sizes : mapping of (str, str) to int
        Bytes by place (CPU, CPU_Mapped, CUDA0) and kind (model, KV); the log rounds to 0.01 MiB.
    """

    sizes: Mapping[tuple[str, str], int]

    @property
    def weights(self) -> int:
        """Tensors of the model and of its LoRA adapters, mapped or copied, in bytes."""
        return self._sum("model", "LoRA")

    @property
    def weight_copies(self) -> int:
        """Those of them that are memory of the process, as laid out anew for the processor."""
        return self._sum("model", "LoRA", where=_is_own)

    @property
    def kv(self) -> int:
        """Key-value cache, or the state of a recurrent model, in bytes."""
        return self._sum("KV", "RS")

    @property
    def own_kv(self) -> int:
        """What of it is memory of the process, in bytes."""
        return self._sum("KV", "RS", where=_is_own)

    @property
    def compute(self) -> int:
        """Scratch of the computation, in bytes."""
        return self._sum("compute")

    @property
    def output(self) -> int:
        """Logits of one batch, in bytes."""
        return self._sum("output")

    @property
    def device(self) -> int:
        """All that is on GPUs, in bytes."""
        return sum(size for (place, _), size in self.sizes.items() if not _is_host(place))

    def __or__(self, other: Buffers) -> Buffers:
        """Both; where they tell of the same place and kind, what the other one does."""
        return Buffers({**self.sizes, **other.sizes})

    def _sum(self, *kinds: str, where: Callable[[str], bool] = lambda place: True) -> int:
        return sum(size for (at, kind), size in self.sizes.items() if kind in kinds and where(at))


def _is_host(place: str) -> bool:
    """Whether a buffer is in main memory; CUDA_Host is, for all its name."""
    return place.startswith("CPU") or place.endswith("_Host")


def _is_own(place: str) -> bool:
    """Whether a buffer is memory of the process: not the GPU's, and not the mapped file."""
    return _is_host(place) and not place.endswith("_Mapped")


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
    _sizes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def start(self) -> None:
        """Forget the log, before something that may fail or that tells its buffers."""
        self.log.clear()
        self._sizes.clear()

    def buffers(self) -> Buffers:
        """Memory that was announced since `start`."""
        return Buffers(dict(self._sizes))

    def has_device(self) -> bool:
        """Whether ggml knows a GPU or an rpc worker; llama.cpp says yes of any build that has RPC."""
        ggml = ctypes.CDLL(self.api.llama_cpp._lib._name)  # a handle whose declarations are ours
        ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
        return any(ggml.ggml_backend_dev_by_type(kind) for kind in _GPU_TYPES)

    def failure(self, message: str, remedy: str = "") -> RuntimeFailure:
        """Make an error that carries what llama.cpp said; its first complaint is the cause.

        Parameters
        ----------
        message : str
            What failed.
        remedy : str
            What to do about it.
        """
        errors = [_clean(text) for level, text in self.log if level == _ERROR]
        reason = f" ({errors[0]})" if errors else ""
        others = errors[1:] if errors else [_clean(text) for _, text in self.log]
        # each caller of what failed says so once more
        detail = [text for text in others if "failed to" not in text and text not in errors[:1]]
        end = f": {remedy}" if remedy else ""
        return RuntimeFailure(f"{message}{reason}{end}", detail="\n".join(detail))

    def load_failure(self, path: Path) -> RuntimeFailure:
        """Make an error for a model that llama.cpp does not load.

        Parameters
        ----------
        path : Path
            The model's file.
        """
        said = "".join(text for _, text in self.log)
        remedy = "get or make the file again, or update llama-cpp-python"
        if "unknown model architecture" in said:
            remedy = "update llama-cpp-python, or convert the model with edgemerge convert"
        elif "failed to allocate" in said:
            remedy = "close other programs, or take a smaller file type or --ctx"
        return self.failure(f"{path}: llama.cpp cannot load this model", remedy)


def _clean(text: str) -> str:
    """Take from a line of the log the function that wrote it, and what our message says already."""
    return re.sub(r"^\w+: |error loading model: ", "", text.strip())


@cache
def load_library() -> Library:
    """Load llama.cpp and take over its log.

    Raises
    ------
    RuntimeFailure
        llama-cpp-python is not installed, or its shared library does not load, or has no code for this
        processor.
    """
    wait_briefly(os.environ)
    # Where llama.cpp aborts all the same, it would start a debugger and fill the terminal.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
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
    sizes: Counter[tuple[str, str]] = Counter()

    def keep(level: int, text: bytes, user_data: object) -> None:
        line = text.decode("utf-8", errors="replace")
        if level in (_WARNING, _ERROR):
            log.append((level, line))
        elif found := _BUFFER.search(line):
            place, kind, size = found.groups()
            sizes[place, kind] += round(float(size) * 2**20)

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    load_backends(llama_cpp)
    llama_cpp.llama_backend_init()
    return Library(llama_cpp, log, callback, sizes)
