"""Fuzz the server by its own OpenAPI description: `python -m tools.fuzz.api MODEL.gguf [OPTION...]`.

Needs schemathesis (pip install schemathesis), which the tests do not; options are those of its `run`.
The server does not give its description away, so it is made of the forms of its requests and put into a file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from edgemerge.runtime.serve.app import ROUTES
from edgemerge.runtime.serve.chat import ChatRequest
from edgemerge.runtime.serve.completions import CompletionRequest
from edgemerge.runtime.serve.embeddings import EmbeddingRequest, RerankRequest
from edgemerge.runtime.serve.reload import ReloadRequest
from edgemerge.runtime.serve.requests import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RELOAD,
    RERANK,
    RESPONSES,
    Body,
)
from edgemerge.runtime.serve.responses import ResponsesRequest
from edgemerge.runtime.serve.tokens import DetokenizeRequest, TokenizeRequest
from tests.support.serving import Serving

KEY = "fuzz"
FORMS: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    COMPLETIONS: CompletionRequest,
    RESPONSES: ResponsesRequest,
    EMBEDDINGS: EmbeddingRequest,
    RERANK: RerankRequest,
    RELOAD: ReloadRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def describe() -> dict[str, object]:
    """Return the OpenAPI description of the server."""
    responses = {"200": {"description": "the answer"}}
    schemas: dict[str, object] = {}
    paths: dict[str, object] = {
        path: {"get": {"responses": responses}} for path in sorted(ROUTES - FORMS.keys())
    }
    for path, form in FORMS.items():
        schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"requestBody": body, "responses": responses}}
    about = {"title": "edgemerge", "version": "1"}
    return {
        "openapi": "3.1.0",
        "info": about,
        "paths": paths,
        "components": {"schemas": schemas},
    }


def main() -> int:
    """Run schemathesis against a server; 0 where nothing ended in a 5xx."""
    program = shutil.which("schemathesis") or Path(sys.executable).with_name("schemathesis")
    model, *options = sys.argv[1:]
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as schema,
        Serving(model, "--max-tokens", 2, "--ctx", 256, "--queue", 64, key=KEY) as server,
    ):
        json.dump(describe(), schema)
        schema.flush()
        command = [program, "run", schema.name, "--url", server.url, "--workers", "2"]
        command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"]
        command += ["-H", f"Authorization: Bearer {KEY}", *options]
        status = subprocess.run(command, check=False).returncode
        print(server.log(), end="", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
