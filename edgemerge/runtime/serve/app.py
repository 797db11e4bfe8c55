"""The app: llama-cpp-python's own routes, and ours where theirs fall short."""

from __future__ import annotations

import contextlib
import json
from importlib import resources
from importlib.metadata import version
from typing import Any, NoReturn

import llama_cpp.server.app as llama_app
from anyio.streams.memory import MemoryObjectSendStream
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from llama_cpp.server.errors import RouteErrorHandler
from llama_cpp.server.settings import ServerSettings
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.serve.active_request import current_run
from edgemerge.runtime.serve.completions import add_completions
from edgemerge.runtime.serve.errors import Refusal, explain
from edgemerge.runtime.serve.models import ModelStore
from edgemerge.runtime.serve.requests import MODEL_ROUTES
from edgemerge.runtime.serve.status import Status

__all__ = ["ROUTES", "make_app"]

ROUTES = frozenset({*MODEL_ROUTES, "/", "/health", "/metrics", "/v1/models", "/tokenizer_info"})

_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
# What is replaced or called in llama-cpp-python's app, beside its router.
_TAKEN = ("_llama_proxy", "get_llama_proxy", "get_event_publisher", "prepare_request_resources")
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def make_app(models: ModelStore, status: Status) -> FastAPI:
    """Put the app together; `gate.Gate` has to stand in front of it.

    Not llama-cpp-python's `create_app`: it lets web pages of any site in, with credentials.

    Parameters
    ----------
    models : ModelStore
        What its routes ask for models.
    status : Status
        What /health and /metrics tell.

    Raises
    ------
    RuntimeFailure
        llama-cpp-python's server is not as it is known here.
    """
    app = FastAPI(title="edgemerge", docs_url=None, redoc_url=None, openapi_url=None)
    _add_status(app, models, status)
    _add_page(app)
    router = APIRouter(route_class=RouteErrorHandler)
    _add_tokenizer(router, models)
    add_completions(router)
    app.include_router(router)
    _take_over_llama_app(models)
    app.include_router(llama_app.router)  # after ours: the first that fits answers
    for error in (Refusal, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(error, _refuse)
    return app


def _take_over_llama_app(models: ModelStore) -> None:
    """Give llama-cpp-python's routes our models, our errors and our streams."""
    if missing := [name for name in _TAKEN if not hasattr(llama_app, name)]:
        raise RuntimeFailure(
            f"llama-cpp-python {version('llama-cpp-python')} has another server inside (no "
            f"{missing[0]}): install 0.3.36"
        )
    # model_construct, because the usual way takes settings from the environment: HOST, API_KEY, ...
    settings = ServerSettings.model_construct(interrupt_requests=False, api_key=None)
    llama_app.set_server_settings(settings)
    llama_app._llama_proxy = models
    llama_app.get_event_publisher = _publish
    RouteErrorHandler.error_message_wrapper = _raise_refusal


def _raise_refusal(_route: Any, error: Exception, body: Any = None) -> NoReturn:
    """Let `_refuse` answer; theirs prints tracebacks and answers 500 to a wrong type."""
    raise explain(error)


async def _publish(
    request: Request,
    inner_send_chan: MemoryObjectSendStream[Any],
    body: Any,
    body_model: str | None,
    llama_call: Any,
    kwargs: dict[str, Any],
) -> None:
    """Send a stream's events; in place of theirs, which loses errors and prints disconnections."""
    run = current_run.get()
    began = False
    async with (
        contextlib.asynccontextmanager(llama_app.get_llama_proxy)() as proxy,
        inner_send_chan,
    ):
        try:
            llama = llama_app.prepare_request_resources(body, proxy, body_model, kwargs)
            chunk: dict[str, Any] = {}
            async for chunk in iterate_in_threadpool(
                await run_in_threadpool(llama_call, llama, **kwargs)
            ):
                await inner_send_chan.send({"data": json.dumps(chunk)})
                began = True
            if run.with_usage:
                usage = {**chunk, "choices": [], "usage": run.usage}
                await inner_send_chan.send({"data": json.dumps(usage)})
            await inner_send_chan.send({"data": "[DONE]"})
        except Exception as error:
            refusal = explain(error)
            if began:
                await inner_send_chan.send({"data": refusal.event()})
            else:
                run.failure = refusal  # the gate can still answer with its status


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    refusal = explain(error)
    return JSONResponse(refusal.content, status_code=refusal.status, headers=refusal.headers)


def _add_status(app: FastAPI, models: ModelStore, status: Status) -> None:
    @app.get("/health")
    def health(request: Request) -> JSONResponse:
        told = status.full() if request.scope["has_key"] else status.brief()
        headers = {"cache-control": "no-store"}
        code = 200 if told["status"] == "ok" else 503
        return JSONResponse(told, status_code=code, headers=headers)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(status.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")  # theirs waits until the running answer is complete
    async def list_models() -> dict[str, Any]:
        data = [
            {"id": file.name, "object": "model", "created": file.created, "owned_by": "edgemerge"}
            for file in models.files.values()
        ]
        return {"object": "list", "data": data}

    @app.get("/tokenizer_info")  # vLLM's, as the two of `_add_tokenizer`
    async def tokenizer_info() -> dict[str, Any]:
        return {**models.files[models.default].tokenizer}


def _add_page(app: FastAPI) -> None:
    """Serve the web page, from wherever the package is installed."""
    folder = resources.files("edgemerge.runtime.serve") / "static"
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def send(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        media_type = _TYPES.get(name[name.rfind(".") :], "application/octet-stream")
        return Response(files[name], media_type=media_type, headers=_PAGE_HEADERS)

    @app.get("/")
    async def page() -> Response:
        return send("index.html")

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        return send(name)


class _Tokenize(BaseModel):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class _Detokenize(BaseModel):
    tokens: list[int]
    model: str | None = None


def _add_tokenizer(router: APIRouter, models: ModelStore) -> None:
    """Add vLLM's routes: lm-evaluation-harness finds the tokenizer there, without transformers."""

    @router.post("/tokenize")
    def tokenize(body: _Tokenize) -> dict[str, Any]:
        llama: Any = models(body.model)
        text = body.prompt.encode()
        tokens = llama.tokenize(text, add_bos=body.add_special_tokens, special=True)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": llama.n_ctx()}

    @router.post("/detokenize")
    def detokenize(body: _Detokenize) -> dict[str, Any]:
        llama: Any = models(body.model)
        return {"prompt": llama.write_text(body.tokens)}
