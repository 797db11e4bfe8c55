"""Fuzz the server by its own OpenAPI description: `python -m tools.fuzz.api MODEL.gguf [OPTION...]`.

Needs schemathesis (pip install schemathesis), which the tests do not; options are those of its `run`.
The server does not give its description away, so it is taken from the app and put into a file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from edgemerge.runtime.serve.options import ServeOptions
from edgemerge.runtime.serve.service import Service
from tests.support.serving import Serving

KEY = "fuzz"


def describe(model: Path) -> dict[str, object]:
    """OpenAPI description of a server with this model."""
    return Service(ServeOptions((str(model),))).routes().openapi()


def main() -> int:
    """Run schemathesis against a server; 0 where nothing ended in a 5xx."""
    program = shutil.which("schemathesis") or Path(sys.executable).with_name("schemathesis")
    model, *options = sys.argv[1:]
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as schema,
        Serving(model, "--max-tokens", 2, "--ctx", 256, "--queue", 64, key=KEY) as server,
    ):
        json.dump(describe(Path(model)), schema)
        schema.flush()
        command = [program, "run", schema.name, "--url", server.url, "--workers", "2"]
        command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"]
        command += ["-H", f"Authorization: Bearer {KEY}", *options]
        status = subprocess.run(command, check=False).returncode
        print(server.log(), end="", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
