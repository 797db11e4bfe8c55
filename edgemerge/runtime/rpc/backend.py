"""ggml's RPC backend: found, told of the workers, or run as one."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.library import Library
from edgemerge.runtime.rpc.addresses import split
from edgemerge.runtime.rpc.loss import watch

__all__ = ["Backend", "connect", "has_backend", "keep_alive", "load_backend"]

_NAME = "libggml-rpc.so"
_HELLO = struct.pack("<BQ24x", 14, 24)  # rpc_cmd, size and rpc_msg_hello_req of ggml-rpc.cpp
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
# A board that loses its power says nothing: after half a minute without a sign it counts as gone.
_KEPT_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),  # ms
)


class Backend:
    """libggml-rpc beside llama.cpp's other libraries, and what of ggml it needs.

    Parameters
    ----------
    path : Path
        The library.
    llama : str
        File of libllama, which brings ggml.
    """

    def __init__(self, path: Path, llama: str) -> None:
        handle, text = ctypes.c_void_p, ctypes.c_char_p
        self.rpc = ctypes.CDLL(str(path))
        self.ggml = ctypes.CDLL(llama)  # a handle of our own, whose declarations nobody changes
        self.rpc.ggml_backend_rpc_add_server.restype = handle
        self.rpc.ggml_backend_rpc_add_server.argtypes = [text]
        self.rpc.ggml_backend_rpc_start_server.restype = None
        self.rpc.ggml_backend_rpc_start_server.argtypes = [
            *(text, text, ctypes.c_size_t, ctypes.c_size_t),
            ctypes.POINTER(handle),
        ]
        self.ggml.ggml_backend_register.restype = None
        self.ggml.ggml_backend_register.argtypes = [handle]
        self.ggml.ggml_backend_dev_by_type.restype = handle
        self.ggml.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]

    def add(self, address: str) -> None:
        """Make a worker's devices known; models loaded from now on use them.

        Raises
        ------
        RuntimeFailure
            It has no devices.
        """
        registry = self.rpc.ggml_backend_rpc_add_server(address.encode())
        if not registry:
            raise RuntimeFailure(
                f"the rpc worker at {address} has no devices: start it again with edgemerge rpc-worker"
            )
        self.ggml.ggml_backend_register(registry)

    def serve(self, address: str, n_threads: int) -> None:
        """Compute for others, one after the other; returns only where it cannot listen."""
        devices = (ctypes.c_void_p * 1)(self._device())
        self.rpc.ggml_backend_rpc_start_server(address.encode(), None, n_threads, 1, devices)

    def _device(self) -> int:
        """Take the GPU where there is one, else the processor (ggml_backend_dev_type of ggml-backend.h)."""
        cpu, gpu, integrated = 0, 1, 2
        found = (self.ggml.ggml_backend_dev_by_type(kind) for kind in (gpu, integrated, cpu))
        return next(int(device) for device in found if device)


def connect(library: Library, addresses: Sequence[str]) -> None:
    """Let models that are loaded from now on be computed by workers.

    Parameters
    ----------
    library : Library
        The loaded llama.cpp.
    addresses : sequence of str
        `ADDRESS:PORT` of the workers, in the order of their layers.

    Raises
    ------
    RuntimeFailure
        llama.cpp has no RPC backend, or a worker is not there or not free.
    """
    backend = load_backend(library)
    for address in addresses:
        _check_free(address)
    watch(backend.ggml, addresses)
    for address in addresses:
        backend.add(address)


def _check_free(address: str) -> None:
    """See that a worker is there and takes us: it serves one process, and lets others wait for ever."""
    try:
        with socket.create_connection(split(address), _CONNECT_SECONDS) as link:
            link.settimeout(_ANSWER_SECONDS)
            link.sendall(_HELLO)
            link.recv(1)  # any answer, or its end, is ggml's to judge
    except ConnectionResetError:
        pass
    except TimeoutError as error:
        raise RuntimeFailure(
            f"the rpc worker at {address} does not answer: it computes for one process at a time, so end "
            "the other one or start another worker"
        ) from error
    except OSError as error:
        raise RuntimeFailure(
            f"there is no rpc worker at {address} ({error.strerror}): start it there with "
            f"edgemerge rpc-worker --listen {address}"
        ) from error


def keep_alive(addresses: Sequence[str]) -> int:
    """Have the kernel look after connections with these addresses, and after those that come to them.

    Returns
    -------
    int
        Sockets of this process that have such an address at one end.
    """
    n_found = 0
    wanted = [split(address) for address in addresses]
    for link in _sockets():
        with closing(link), suppress(OSError):
            ends = {link.getsockname()}
            with suppress(OSError):  # it listens
                ends.add(link.getpeername())
            if ends.intersection(wanted):
                for option in _KEPT_ALIVE:
                    link.setsockopt(*option)
                n_found += 1
    return n_found


def _sockets() -> Iterator[socket.socket]:
    """Copy this process's sockets: ggml keeps its own to itself."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                yield socket.socket(fileno=os.dup(int(name)))


def load_backend(library: Library) -> Backend:
    """Load the RPC backend of a loaded llama.cpp.

    Raises
    ------
    RuntimeFailure
        There is none.
    """
    llama: str = library.api.llama_cpp._lib._name
    path = _path(llama)
    if not path.exists():
        raise RuntimeFailure(
            "this llama.cpp was built without its RPC backend: in a checkout of edgemerge run make rpc, else "
            "CMAKE_ARGS=-DGGML_RPC=ON pip install --no-deps --force-reinstall --no-cache-dir "
            f"--no-binary llama-cpp-python llama-cpp-python=={version('llama-cpp-python')}"
        )
    try:
        return _load(path, llama)
    except (OSError, AttributeError) as error:
        raise RuntimeFailure(
            f"{path} does not load with this llama.cpp ({error}): delete it, and make it again with make rpc"
        ) from error


@cache
def _load(path: Path, llama: str) -> Backend:
    return Backend(path, llama)


def has_backend(library: Library) -> bool:
    """Whether the RPC backend lies beside llama.cpp's libraries."""
    return _path(library.api.llama_cpp._lib._name).exists()


def _path(llama: str) -> Path:
    """Return the library that a wheel brings, else that of tools/llama/build-rpc for this version."""
    brought = Path(llama).with_name(_NAME)
    return brought if brought.exists() else Path(f"{brought}.{version('llama-cpp-python')}")
