"""`edgemerge serve` as a process of its own, for tests that talk to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.talking import TEMPLATE

COMMAND = [sys.executable, "-m", "edgemerge", "serve"]
# The small models answer before a test can look: this one takes 20 ms for a token, and has no end.
SLOWLY = [
    sys.executable,
    "-c",
    "import asyncio, sys\n"
    "from edgemerge.cli import main\n"
    "from edgemerge.runtime.engine.messages import Begun, Ended, Piece\n"
    "from edgemerge.runtime.engine.process import ModelProcess\n"
    "async def slowly(self, wanted):\n"
    "    yield Begun(3, 0)\n"
    "    for i in range(wanted.max_tokens):\n"
    "        await asyncio.sleep(0.02)\n"
    "        yield Piece(f' {i}', 1)\n"
    "    yield Ended('length', wanted.max_tokens)\n"
    "ModelProcess.generate = slowly\n"
    "sys.argv = ['edgemerge', 'serve', *sys.argv[1:]]\n"
    "main()",
]
PATIENCE = 60.0  # seconds


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error


def make_served_gguf(models_dir: Path, path: Path, name: str = "base") -> Path:
    """A real small model in float32, with a chat template."""
    source = (str(models_dir / name), None)
    recipe = make_recipe("passthrough", [source], out_type="F32")
    merge(replace(recipe, chat_template=TEMPLATE), path)
    return path


class Serving:
    """A server on a free port; use it in a `with` statement."""

    def __init__(self, *arguments: object, slowly: bool = False, key: str | None = None) -> None:
        self.key = key
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("EDGEMERGE_API_KEY", None)
        if key is not None:
            environment["EDGEMERGE_API_KEY"] = key
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*(SLOWLY if slowly else COMMAND), "--port", "0", "-t", "1", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)", line)
        assert found, f"it did not start: {line}{self.log()}"
        self.url, self.port = found[0], int(found[1])
        while not self.process.stdout.readline().startswith("  page"):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._log.close()

    def log(self) -> str:
        """What it wrote on stderr."""
        self._log.seek(0)
        return self._log.read()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def get(self, path: str, **headers: str) -> Answer:
        return self.send(path, None, **headers)

    def post(self, path: str, document: Any, **headers: str) -> Answer:
        return self.send(path, json.dumps(document).encode(), **headers)

    def send(self, path: str, body: bytes | None, **headers: str) -> Answer:
        if self.key is not None:
            headers = {"Authorization": f"Bearer {self.key}", **headers}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return Answer(answer.status, answer.read(), dict(answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read(), dict(error.headers))

    def health(self) -> dict[str, Any]:
        told: dict[str, Any] = self.get("/health").json
        return told

    def wait_until(self, **queue: int) -> None:
        """Wait until the queue of /health is so."""
        end = time.monotonic() + PATIENCE
        while (now := self.health()["queue"]) | queue != now:
            assert time.monotonic() < end, f"{now}, not {queue}"
            time.sleep(0.02)
