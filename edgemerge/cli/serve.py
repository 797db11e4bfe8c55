"""`edgemerge serve`: OpenAI's interface to models on this machine."""

from __future__ import annotations

import os
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli import loading, request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.loading import ContextSize, GpuLayers, Loras, Threads, parse_loras
from edgemerge.cli.terminal import speaks_plainly
from edgemerge.errors import RuntimeFailure

if TYPE_CHECKING:
    from edgemerge.finding.finder import Finder
    from edgemerge.runtime.serve.options import ServeOptions, Started

__all__ = ["serve_command"]

MAX_KEY_BYTES = 4096

KEY_VARIABLE = "EDGEMERGE_API_KEY"


class KvType(StrEnum):
    """Types of the cache, as of `EngineOptions`."""

    F16 = "f16"
    Q8_0 = "q8_0"


@speaks_plainly
def serve_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL...",
            help="GGUF files, or org/name:TYPE; clients call each by its name [default: the file's].",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help=f"Key that clients must send; others on this machine can see it here, so better "
            f"use {KEY_VARIABLE} or --api-key-file.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="File with the key.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Name under which a proxy on this machine passes requests on; may be repeated.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Budget of the process; models unused for longest are closed to stay below it "
            "[default: 90 % of what is free].",
        ),
    ] = None,
    context: ContextSize = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = None,
    lora: Loras = None,
    rpc: loading.Rpc = None,
    i_trust_this_network: loading.TrustNetwork = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="Longest answer in tokens.")
    ] = 4096,
    parallel: Annotated[
        int | None,
        typer.Option(
            "--parallel",
            min=1,
            max=64,
            metavar="N",
            help="Requests that a model answers at a time [default: 8].",
            show_default=False,
        ),
    ] = None,
    kv_type: Annotated[
        KvType,
        typer.Option(
            "--kv-type",
            help="Type of what is kept of each token; q8_0 takes half of the memory.",
        ),
    ] = KvType.F16,
    close_idle: Annotated[
        float,
        typer.Option(
            "--close-idle",
            min=0.0,
            metavar="S",
            help="Seconds after which a model that nobody uses is closed; 0 for never.",
        ),
    ] = 3600.0,
    queue: Annotated[
        int, typer.Option("--queue", min=1, metavar="N", help="Requests that may wait.")
    ] = 16,
    queue_timeout: Annotated[
        float,
        typer.Option("--queue-timeout", min=0.1, metavar="S", help="Longest wait in seconds."),
    ] = 120.0,
    request_timeout: Annotated[
        float,
        typer.Option("--request-timeout", min=0.1, metavar="S", help="Longest answer in seconds."),
    ] = 600.0,
    grace: Annotated[
        float,
        typer.Option(
            "--grace", min=0.0, metavar="S", help="Seconds that running answers have at a stop."
        ),
    ] = 30.0,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Let /metrics be read without the key.")
    ] = False,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log a line per request on stderr.")
    ] = False,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log",
            metavar="FILE",
            help="Add a line of JSON per request: time, route, model's SHA-256, tokens, seconds, status.",
        ),
    ] = None,
    log_prompts: Annotated[
        bool,
        typer.Option(
            "--log-prompts", help="Log what people write too; the page tells them that it is."
        ),
    ] = False,
    require_signature: Annotated[
        Path | None,
        typer.Option(
            "--require-signature",
            metavar="PUB.pem",
            help="Load only models and adapters that were signed with this key.",
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site",
            metavar="DIR",
            help="Folder of this device: its current model is served in place of the first MODEL, and the "
            "page's Models tab merges, compares and promotes in it.",
        ),
    ] = None,
    merge_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--merge-from",
            metavar="DIR",
            help="Folder of GGUF models, deltas and FILE.jsonl of questions that the Models tab may take; "
            "may be repeated.",
        ),
    ] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Write a systemd unit that does this, and end.")
    ] = False,
    unit_dir: Annotated[
        Path | None,
        typer.Option("--unit-dir", metavar="FOLDER", help="Where --install writes.", hidden=True),
    ] = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    force: request.Force = False,
) -> None:
    """Serve models to OpenAI's clients and to a web page."""
    from edgemerge.runtime.serve.options import Limits, ServeOptions
    from edgemerge.runtime.serve.server import serve
    from edgemerge.sizes import parse_size

    finder = make_finder(models_folder, download)
    options = ServeOptions(
        models=_with_site([_find(text, finder) for text in models or ()], site),
        host=host,
        port=port,
        key=_read_key(api_key, api_key_file),
        hosts=frozenset(name.lower() for name in allow_host or ()),
        memory=parse_size(memory) if memory is not None else None,
        n_ctx=context,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        loras=parse_loras(lora),
        kv_type=kv_type.value,
        rpc=loading.parse_rpc(rpc, i_trust_this_network),
        n_sequences=parallel,
        idle_seconds=close_idle,
        queue=queue,
        queue_seconds=queue_timeout,
        grace=grace,
        open_metrics=open_metrics,
        log_requests=log_requests,
        limits=Limits(max_tokens=max_tokens, request_seconds=request_timeout),
        log=log,
        log_prompts=log_prompts,
        public_key=require_signature,
        site=site,
        merge_folders=tuple(merge_from or ()),
    )
    _check_site(options)
    if log_prompts and log is None:
        raise typer.BadParameter("--log-prompts goes with --log FILE")
    if options.loras and len(options.models) > 1:
        raise typer.BadParameter("--lora goes with one model")
    if options.rpc and len(options.models) > 1:  # a worker computes for one process
        raise typer.BadParameter("--rpc goes with one model")
    if install and (log is not None or site is not None):
        raise typer.BadParameter(
            "--install: the service may write no files, so leave out --log and --site"
        )
    if install:
        _install(options, unit_dir, force=force)
        return
    _set_up_log(log_requests)
    serve(options, partial(_announce, n_ctx=context))


def _find(text: str, finder: Finder) -> tuple[str, Path]:
    """Find the model of `[NAME=]MODEL`; without a name, it has that of its file."""
    name, equals, model = text.partition("=")
    if equals and not Path(text).exists():
        return name, finder.find_model(model)
    path = finder.find_model(text)
    return path.stem, path


def _with_site(models: list[tuple[str, Path]], site: Path | None) -> tuple[tuple[str, Path], ...]:
    """Let the current model of a device's folder take the place of the first, and its name."""
    from edgemerge.site.folder import SiteFolder

    if site is None or not SiteFolder(site).current_path.exists():
        if models:
            return tuple(models)
        missing = "" if site is None else f"--site {site} has no current model yet; "
        raise typer.BadParameter(f"{missing}give a MODEL to begin with")
    name = models[0][0] if models else site.resolve().name
    return ((name, SiteFolder(site).current_path), *models[1:])


def _check_site(options: ServeOptions) -> None:
    if options.merge_folders and options.site is None:
        raise typer.BadParameter("--merge-from goes with --site DIR, where merges go")
    if options.site is not None and options.public_key is not None:
        raise typer.BadParameter(
            "--require-signature serves signed files only, and what --site merges is not signed: "
            "leave out one"
        )
    for folder in options.merge_folders:
        if not folder.is_dir():
            raise typer.BadParameter(f"--merge-from {folder}: there is no such folder")


def _read_key(key: str | None, file: Path | None) -> str | None:
    """Take the key from the first place that has one."""
    if key is not None and file is not None:
        raise typer.BadParameter("give --api-key or --api-key-file, not both")
    if file is not None:
        from edgemerge.formats.files import read_text

        return read_text(file, MAX_KEY_BYTES).strip()
    return key if key is not None else os.environ.get(KEY_VARIABLE)


def _set_up_log(log_requests: bool) -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="edgemerge: %(levelname)s: %(message)s")
    # It warns of each request that is no HTTP: whoever reaches the port could fill the disk.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    if log_requests:
        for name in ("uvicorn.access", "edgemerge"):
            logging.getLogger(name).setLevel(logging.INFO)


def _install(options: ServeOptions, directory: Path | None, *, force: bool) -> None:
    from edgemerge.runtime.serve.models import read_model_file
    from edgemerge.runtime.serve.server import check_key
    from edgemerge.runtime.serve.systemd import Service, write_unit

    files = [read_model_file(path, options.n_ctx, name=name) for name, path in options.models]
    gpu = _uses_gpu(options.n_gpu_layers)
    service = Service(
        models={file.name: file.path for file in files},
        host=options.host,
        port=options.port,
        grace=options.grace,
        memory=options.memory,
        loras=options.loras,
        public_key=options.public_key,
        gpu=bool(gpu),
        rpc=options.rpc,
        api_key=options.key,
        options=_other_arguments(options),
    )
    check_key(options, is_local=service.is_local)
    print(write_unit(service, directory=directory, force=force))
    if gpu is None:
        print(
            "GPU devices are closed to it, since llama.cpp could not be asked for one here: where there is "
            "a GPU, run this again with -g N and --force."
        )


def _uses_gpu(n_layers: int | None) -> bool | None:
    """Whether layers go to a GPU, as is found when a model is loaded; None where that cannot be told."""
    from edgemerge.runtime.library import load_library

    if n_layers is not None:
        return n_layers > 0
    try:
        return load_library().has_device()
    except RuntimeFailure:
        return None


def _other_arguments(options: ServeOptions) -> list[str]:
    """Arguments that the unit has to repeat; those that are as by default change nothing."""
    values = {
        "--ctx": options.n_ctx,
        "--threads": options.n_threads,
        "--gpu-layers": options.n_gpu_layers,
        "--parallel": options.n_sequences,
        "--kv-type": options.kv_type,
        "--close-idle": options.idle_seconds,
        "--queue": options.queue,
        "--queue-timeout": options.queue_seconds,
        "--request-timeout": options.limits.request_seconds,
        "--max-tokens": options.limits.max_tokens,
    }
    arguments = [
        text for name, value in values.items() if value is not None for text in (name, str(value))
    ]
    for name in sorted(options.hosts):
        arguments += ["--allow-host", name]
    flags = {"--open-metrics": options.open_metrics, "--log-requests": options.log_requests}
    return arguments + [name for name, given in flags.items() if given]


def _announce(started: Started, n_ctx: int | None) -> None:
    from edgemerge.sizes import format_size

    key = "clients need the key" if started.has_key else "no key needed"
    print(f"edgemerge serves at {started.url} ({key})")
    for file in started.models:
        print(
            f"  model {file.name}: {file.n_sequences} requests at a time, {file.n_ctx} tokens of "
            f"context each, {file.n_cache} kept in all, about {format_size(file.need)}"
        )
        if n_ctx is not None and file.n_ctx < n_ctx:
            print(f"    --ctx {n_ctx} is more than it was trained on, or than memory holds")
    print(f"  memory: at most {format_size(started.memory)}")
    print(f"  page {started.url}/  API {started.url}/v1  figures {started.url}/metrics", flush=True)
