"""Serve models to OpenAI's clients: `edgemerge serve`."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from edgemerge.errors import RecipeError, RuntimeFailure
from edgemerge.process import read_process
from edgemerge.runtime.board.device import read_memory
from edgemerge.runtime.library import load_library
from edgemerge.runtime.llama import Lora
from edgemerge.runtime.serve.key import check_characters
from edgemerge.runtime.serve.requests import Limits

__all__ = ["ServeOptions", "Started", "check_key", "serve"]

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_SHARE = 0.9  # of the memory that is available, where no budget is given
_LEAST_KEY = 16  # characters, where others can try keys out
_CONNECTIONS = 256  # beside those that wait: health checks, pages, clients that come for a 429


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to serve, and how.

    Attributes
    ----------
    models : tuple of str
        `FILE` or `NAME=FILE`; the first is the default.
    host, port : str, int
        Address to listen on; port 0 takes any free one.
    key : str or None
        API key; needed on addresses that other machines reach.
    hosts : frozenset of str
        Names under which a proxy on this machine passes requests on.
    memory : int or None
        Bytes that the whole process may take; by default 90 % of what is available.
    n_ctx, n_threads, n_gpu_layers, loras
        As of `ServedLlama`; None for the defaults.
    queue : int
        Requests that may wait.
    queue_seconds : float
        How long one may wait.
    grace : float
        Seconds that a running answer gets when the server is told to stop.
    open_metrics : bool
        Whether /metrics needs no key.
    log_requests : bool
        Whether to log a line per request.
    limits : Limits
        Bounds of one request.
    log : Path or None
        File that requests are written down in.
    log_prompts : bool
        Whether what people wrote is written down too.
    public_key : Path or None
        Key with which every model and adapter must be signed.
    """

    models: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    hosts: frozenset[str] = frozenset()
    memory: int | None = None
    n_ctx: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    loras: tuple[Lora, ...] = ()
    queue: int = 16
    queue_seconds: float = 120.0
    grace: float = 30.0
    open_metrics: bool = False
    log_requests: bool = False
    limits: Limits = field(default_factory=Limits)
    log: Path | None = None
    log_prompts: bool = False
    public_key: Path | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A server that takes requests.

    Attributes
    ----------
    url : str
        Where.
    models : tuple of (str, int, int)
        Name, tokens of context and bytes of memory of each.
    memory : int
        Bytes that it may take.
    has_key : bool
        Whether clients need a key.
    """

    url: str
    models: tuple[tuple[str, int, int], ...]
    memory: int
    has_key: bool


def serve(options: ServeOptions, on_start: Callable[[Started], None]) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; answers that run then are finished.

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
    load_library()
    try:
        from edgemerge.runtime.serve.app import ROUTES, make_app
        from edgemerge.runtime.serve.http import open_socket, run_server
        from edgemerge.runtime.serve.llama import ServedLlama
        from edgemerge.runtime.serve.status import Status
    except ImportError as error:
        raise RuntimeFailure(
            f"serving needs {error.name}: install it with pip install 'edgemerge[serve]'"
        ) from error
    from edgemerge.runtime.serve.gate import Access, Gate
    from edgemerge.runtime.serve.models import ModelFile, ModelStore, Servable, read_model_file
    from edgemerge.runtime.serve.queue import Queue
    from edgemerge.runtime.serve.request_log import RequestLog
    from edgemerge.runtime.serve.signed import SignedLoader

    def load_unsigned(file: ModelFile) -> ServedLlama:
        return ServedLlama(
            file.path,
            n_ctx=file.n_ctx,
            n_threads=options.n_threads,
            n_gpu_layers=options.n_gpu_layers,
            loras=options.loras,
        )

    files = [read_model_file(text, options.n_ctx) for text in options.models]
    load: Callable[[ModelFile], Servable] = load_unsigned
    if options.public_key is not None:
        loras = (lora.path for lora in options.loras)
        load = signed = SignedLoader(load_unsigned, options.public_key, loras)
        for file in files[1:]:  # the first is loaded right away
            signed.check(file.path)
    floor = read_process().rss
    budget = options.memory or floor + int(_SHARE * read_memory().available)
    models = ModelStore(files, load, budget=budget, floor=floor)
    with ExitStack() as stack:
        listener = stack.enter_context(open_socket(options.host, options.port))
        request_log = None
        if options.log is not None:
            request_log = RequestLog(options.log, with_prompts=options.log_prompts)
            stack.callback(request_log.close)
        is_local = _is_loopback(listener)
        check_key(options, is_local=is_local)
        queue = Queue(options.queue, options.queue_seconds)
        status = Status(models, queue, logs_prompts=options.log is not None and options.log_prompts)
        gate = Gate(
            make_app(models, status),
            access=Access(
                options.key,
                options.hosts | _LOOPBACK_NAMES if is_local else frozenset(),
                options.open_metrics,
            ),
            limits=options.limits,
            models=models,
            queue=queue,
            status=status,
            routes=ROUTES,
            request_log=request_log,
        )
        models.preload()
        started = Started(
            _url(options.host, listener),
            tuple((file.name, file.n_ctx, file.need) for file in files),
            budget,
            options.key is not None,
        )
        try:
            run_server(
                gate,
                listener,
                queue=queue,
                status=status,
                grace=options.grace,
                max_connections=_CONNECTIONS + options.queue,
                log_requests=options.log_requests,
                on_start=lambda: on_start(started),
            )
        finally:
            models.close()


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
