"""A file with one line of JSON per request, for whoever has to look into what happened.

A line has the time (UTC), the route, the model's name and SHA-256, tokens, seconds and the status. What
people wrote is in it only where the operator asked for that, which the page then tells its users.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

from edgemerge.errors import OutputError
from edgemerge.runtime.serve.active_request import Run

__all__ = ["RequestLog"]

_logger = logging.getLogger(__name__)


class RequestLog:
    """Appends to a file that only its owner reads.

    Parameters
    ----------
    path : Path
        The file; it is made where there is none, and never cut.
    with_prompts : bool
        Whether what people wrote is logged too.

    Raises
    ------
    OutputError
        It cannot be written, or is no regular file.
    """

    def __init__(self, path: Path, *, with_prompts: bool) -> None:
        self.path = path
        self.with_prompts = with_prompts
        flags = (
            os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", path=path) from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise OutputError("is no regular file; choose another name", path=path)

    def write(self, run: Run, status: int) -> None:
        """Add a line; a disk that is full must not end an answer."""
        had_turn = run.has_turn
        entry = {
            "time": run.came.isoformat(timespec="milliseconds"),
            "route": run.route,
            "status": status,
            "seconds": round(run.seconds, 3),
            "model": run.model,
            "sha256": run.sha256,
            "prompt_tokens": run.prompt_tokens if had_turn else None,
            "answer_tokens": run.generated_tokens if had_turn else None,
        }
        if self.with_prompts:
            entry["request"] = run.said
        line = json.dumps(entry, ensure_ascii=True) + "\n"
        try:
            os.write(self._fd, line.encode())
        except OSError:
            _logger.exception("%s: a request could not be logged", self.path)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
