"""What to serve, and how: options, bounds of requests, and what the command says when it has begun."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgemerge.runtime.llama import Lora
from edgemerge.runtime.serve.models import ModelFile

__all__ = ["Limits", "ServeOptions", "Started"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request.

    Attributes
    ----------
    body : int
        Bytes of JSON.
    max_tokens, default_tokens : int
        Tokens that one answer may have, and has where the request leaves it open.
    request_seconds : float
        From a request's turn to its end.
    read_seconds, send_seconds : float
        For the client to send its request, and to take each piece of the answer.
    """

    body: int = 1 << 20
    max_tokens: int = 4096
    default_tokens: int = 512
    request_seconds: float = 600.0
    read_seconds: float = 20.0
    send_seconds: float = 30.0

    def tokens(self, wanted: int | None) -> int:
        """Tokens that an answer may have, of those that a request wants."""
        return min(self.default_tokens if wanted is None else wanted, self.max_tokens)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to serve, and how.

    Attributes
    ----------
    models : tuple of (str, Path)
        What clients call each, and its file; the first is the default.
    host, port : str, int
        Address to listen on; port 0 takes any free one.
    key : str or None
        API key; needed on addresses that other machines reach.
    hosts : frozenset of str
        Names under which a proxy on this machine passes requests on.
    memory : int or None
        Bytes that the whole process may take; by default 90 % of what is available.
    n_ctx : int or None
        Tokens of context of one request, at most the model's own; by default up to 4096.
    n_threads, n_gpu_layers, loras, kv_type, rpc
        As of `EngineOptions`; None for the defaults.
    n_sequences : int or None
        Requests that a model answers at a time.
    idle_seconds : float
        After so long a model that nobody uses is closed; 0 for never.
    queue : int
        Requests that may wait.
    queue_seconds : float
        How long one may wait.
    grace : float
        Seconds that running answers get when the server is told to stop.
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
    site : Path or None
        Folder of the device (`edgemerge.site.folder`), whose current model is the first of `models`.
    merge_folders : tuple of Path
        Other folders whose files the page may merge and ask.
    """

    models: tuple[tuple[str, Path], ...]
    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    hosts: frozenset[str] = frozenset()
    memory: int | None = None
    n_ctx: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    loras: tuple[Lora, ...] = ()
    kv_type: str = "f16"
    rpc: tuple[str, ...] = ()
    n_sequences: int | None = None
    idle_seconds: float = 3600.0
    queue: int = 16
    queue_seconds: float = 120.0
    grace: float = 30.0
    open_metrics: bool = False
    log_requests: bool = False
    limits: Limits = field(default_factory=Limits)
    log: Path | None = None
    log_prompts: bool = False
    public_key: Path | None = None
    site: Path | None = None
    merge_folders: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """A server that takes requests.

    Attributes
    ----------
    url : str
        Where.
    models : tuple of ModelFile
        What is served.
    memory : int
        Bytes that it may take.
    has_key : bool
        Whether clients need a key.
    """

    url: str
    models: tuple[ModelFile, ...]
    memory: int
    has_key: bool
