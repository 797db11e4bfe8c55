"""Serve models to OpenAI's clients: `edgemerge serve`."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import ExitStack

from edgemerge.errors import RecipeError, RuntimeFailure
from edgemerge.runtime.serve.key import check_characters
from edgemerge.runtime.serve.options import ServeOptions, Started

__all__ = ["check_key", "serve"]

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_LEAST_KEY = 16  # characters, where others can try keys out
_CONNECTIONS = 256  # beside those that wait: health checks, pages, clients that come for a 429


def serve(options: ServeOptions, on_start: Callable[[Started], None]) -> None:
    """Serve until SIGINT or SIGTERM; answers that run then are finished.

    Parameters
    ----------
    options : ServeOptions
        What to serve.
    on_start : function
        Called once, when requests are taken.

    Raises
    ------
    RuntimeFailure
        The extra is not installed, the port is in use, or llama.cpp refuses the first model.
    RecipeError
        A key is missing or cannot be sent, or two models have one name.
    FormatError
        A model is no GGUF file, or the key for signatures is none.
    BudgetError
        A model does not fit into the memory.
    VerificationError
        A model or adapter is not signed with the key that is required.
    """
    try:
        from edgemerge.runtime.serve.http import open_socket, run_server
        from edgemerge.runtime.serve.service import Service
    except ImportError as error:
        raise RuntimeFailure(
            f"serving needs {error.name}: install it with pip install 'edgemerge[serve]'"
        ) from error
    service = Service(options)
    with ExitStack() as stack:
        listener = stack.enter_context(open_socket(options.host, options.port))
        is_local = _is_loopback(listener)
        check_key(options, is_local=is_local)
        if options.log is not None:
            service.open_log(options.log)
            stack.callback(service.close_log)
        hosts = options.hosts | _LOOPBACK_NAMES if is_local else frozenset()
        url = _url(options.host, listener)
        run_server(
            service.app(hosts),
            listener,
            service,
            lambda: on_start(service.describe(url)),
            grace=options.grace,
            max_connections=_CONNECTIONS + options.queue,
            log_requests=options.log_requests,
        )


def check_key(options: ServeOptions, *, is_local: bool) -> None:
    """See that there is a key where one is needed.

    Parameters
    ----------
    options : ServeOptions
        What is to be served.
    is_local : bool
        Whether only this machine can reach the address.

    Raises
    ------
    RecipeError
        There is none, one that is soon guessed, or one that no HTTP header can have.
    """
    if options.key is None and not is_local:
        raise RecipeError(
            f"{options.host} can be reached by other machines: give the server a key with "
            "--api-key-file or EDGEMERGE_API_KEY",
            field="api_key",
        )
    if options.key is None:
        return
    if not options.key:
        raise RecipeError("the API key is empty: put one in, or take it away", field="api_key")
    check_characters(options.key)
    if len(options.key) < _LEAST_KEY and not is_local:
        raise RecipeError(
            f"other machines could guess an API key of {len(options.key)} characters: take one of at "
            f"least {_LEAST_KEY}, e.g. from openssl rand -hex 24",
            field="api_key",
        )


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _url(host: str, listener: socket.socket) -> str:
    if ipaddress.ip_address(listener.getsockname()[0]).is_unspecified:
        host = socket.gethostname()  # nobody can open 0.0.0.0 in a browser
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
