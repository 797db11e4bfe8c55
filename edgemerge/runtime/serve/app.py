"""The app: all routes together."""

from __future__ import annotations

from importlib import resources
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgemerge.runtime.serve.chat import add_chat
from edgemerge.runtime.serve.completions import add_completions
from edgemerge.runtime.serve.embeddings import add_embeddings
from edgemerge.runtime.serve.errors import Refusal, explain
from edgemerge.runtime.serve.merging.routes import add_merging
from edgemerge.runtime.serve.merging.shown import Shown
from edgemerge.runtime.serve.merging.workshop import Workshop
from edgemerge.runtime.serve.models import ModelFile
from edgemerge.runtime.serve.reload import Reloader, add_reload
from edgemerge.runtime.serve.requests import ADMIN, CHANGE_ROUTES, MODEL_ROUTES, RELOAD
from edgemerge.runtime.serve.responses import add_responses
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.tokens import add_tokens
from edgemerge.runtime.serve.turns import Turns

__all__ = ["ROUTES", "make_app"]

ROUTES = frozenset(
    {
        *(*MODEL_ROUTES, RELOAD, *CHANGE_ROUTES),
        *("/", "/health", "/metrics", "/v1/models", "/tokenizer_info"),
        *(f"{ADMIN}/{name}" for name in ("models", "job", "methods")),
    }
)

_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def make_app(
    turns: Turns, reloader: Reloader, shown: Shown, workshop: Workshop | None, *, has_key: bool
) -> Starlette:
    """Put the app together; `gate.Gate` has to stand in front of it.

    Parameters
    ----------
    turns : Turns
        What gives requests a model.
    reloader : Reloader
        What replaces one.
    shown, workshop, has_key
        As of `add_merging`.
    """
    routes = Routes()
    for add in (add_chat, add_completions, add_responses, add_embeddings, add_tokens):
        add(routes, turns)
    add_reload(routes, reloader, turns.models)
    add_merging(routes, shown, workshop, has_key=has_key)
    _add_status(routes, turns)
    _add_page(routes)
    handlers = dict.fromkeys((Refusal, HTTPException, Exception), _refuse)
    return Starlette(routes=routes.list, exception_handlers=handlers)


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    refusal = explain(error)
    return JSONResponse(refusal.content, status_code=refusal.status, headers=refusal.headers)


def _add_status(routes: Routes, turns: Turns) -> None:
    status, models = turns.status, turns.models

    @routes.get("/health")
    async def health(request: Request) -> JSONResponse:
        told = status.full() if request.scope["has_key"] else status.brief()
        headers = {"cache-control": "no-store"}
        code = 200 if told["status"] == "ok" else 503
        return JSONResponse(told, status_code=code, headers=headers)

    @routes.get("/metrics")
    async def metrics(_request: Request) -> Response:
        return Response(status.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/models")
    async def list_models(_request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [_describe(file) for file in models]}

    @routes.get("/v1/models/{name:path}")
    async def retrieve_model(request: Request) -> dict[str, Any]:
        return _describe(models.resolve(request.path_params["name"]))


def _describe(file: ModelFile) -> dict[str, Any]:
    return {
        "id": file.name,
        "object": "model",
        "created": file.created,
        "owned_by": "edgemerge",
        "max_model_len": file.n_ctx,  # vLLM's
    }


def _add_page(routes: Routes) -> None:
    """Serve the web page, from wherever the package is installed."""
    folder = resources.files("edgemerge.runtime.serve") / "static"
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def send(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        media_type = _TYPES.get(name[name.rfind(".") :], "application/octet-stream")
        return Response(files[name], media_type=media_type, headers=_PAGE_HEADERS)

    @routes.get("/")
    async def page(_request: Request) -> Response:
        return send("index.html")

    @routes.get("/static/{name}")
    async def static(request: Request) -> Response:
        return send(request.path_params["name"])
