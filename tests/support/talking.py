"""`run` and `chat` in this process, or in a terminal that a test types into."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from typer.testing import CliRunner, Result

from edgemerge.cli import make_app

COMMAND = [sys.executable, "-m", "edgemerge"]
# A random model says random bytes at a thousand tokens a second. This one says a word of four
# letters every fiftieth of a second, for as long as there is room: time enough for Ctrl-C.
SLOWLY = [
    sys.executable,
    "-c",
    "import time\n"
    "from edgemerge.cli import main\n"
    "from edgemerge.runtime import llama\n"
    "from edgemerge.runtime.batch import Batch\n"
    "run = Batch.run\n"
    "Batch.run = lambda self: time.sleep(0.02) or run(self)\n"
    "llama.Model.piece = lambda self, token: b'word '\n"
    "llama.Model.is_end = lambda self, token: False\n"
    "main()",
]
# Ctrl-C reaches those whose terminal it is typed in: the first that a new session opens is its own.
_TAKE_TERMINAL = """import os, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execv(sys.argv[1], sys.argv[1:])"""
PATIENCE = 40.0  # seconds
TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role[0] }}.{{ m.content }}.{% endfor %}"
    "{% if add_generation_prompt %}a.{% endif %}"
)


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process; stdin is no terminal."""
    return CliRunner().invoke(
        make_app(), list(map(str, arguments)), input=stdin, prog_name="edgemerge"
    )


class Terminal:
    """A process in a terminal of its own; use it in a `with` statement."""

    def __init__(self, *command: object, folder: Path) -> None:
        self.seen = ""
        self._main, side = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *map(str, command)],
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(side)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)

    def type(self, keys: str) -> None:
        time.sleep(0.2)  # as no hand is faster: readline is not ready when its prompt is seen
        os.write(self._main, keys.encode())

    def wait_for(self, text: str, *, again: str = "") -> str:
        """Read until a text comes; give back what came up to it, and forget that.

        `again` is typed now and then: a signal that comes just before a process waits for a key is
        told to it with the next key.
        """
        for _ in self._wait(again):
            if text in self.seen:
                break
        assert text in self.seen, f"no {text!r}, but {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def wait_for_end(self, *, again: str = "") -> tuple[int, str]:
        """Exit code, and what came until the end."""
        for _ in self._wait(again):
            pass
        return self.process.wait(PATIENCE / 10), self.seen

    def _wait(self, again: str) -> Iterator[None]:
        """Read until the end, or for as long as a test has patience."""
        started = typed = time.monotonic()
        yield
        while self._read() and time.monotonic() < started + PATIENCE:
            if again and time.monotonic() > typed + PATIENCE / 10:
                typed = time.monotonic()
                self.type(again)
            yield

    def _read(self) -> bool:
        """Take what the process wrote, if anything soon; tell whether it may write more."""
        ready, _, _ = select.select([self._main], [], [], 0.1)
        try:
            raw = os.read(self._main, 4096) if ready else b""
        except OSError:  # how Linux tells that the other side is closed
            return False
        self.seen += raw.decode(errors="replace").replace("\r\n", "\n")
        return not ready or bool(raw)
