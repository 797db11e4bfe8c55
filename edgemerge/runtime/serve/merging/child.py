"""A command of this program as a child of the server, at low priority: its progress, its answer, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.complaint import PROGRESS_FD, find_complaint

__all__ = ["Look", "digest_files", "run_command"]

Look = Callable[[dict[str, Any]], None]  # takes a line of `edgemerge.cli.progress_lines`

_HERE = Path(__file__).parent
_PYTHON = [sys.executable, "-I", "-S"]
_END_SECONDS = 10.0  # from SIGTERM to SIGKILL


async def run_command(arguments: Sequence[str], look: Look = lambda _line: None) -> dict[str, Any]:
    """Run `edgemerge ARGUMENTS --json` and return its object.

    A task that is cancelled ends the command first, so that nothing of it is left at work.

    Parameters
    ----------
    arguments : sequence of str
        Of the command, its name first.
    look : function
        Called with each line of its progress.

    Raises
    ------
    RuntimeFailure
        It failed; the message is its own.
    """
    command = [sys.executable, "-P", "-m", "edgemerge", *arguments, "--json"]
    document: dict[str, Any] = await _run(command, look)
    return document


async def digest_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of files, in hexadecimal digits.

    Raises
    ------
    RuntimeFailure
        One cannot be read.
    """
    command = [*_PYTHON, str(_HERE / "digest.py"), *map(str, paths)]
    found: list[str] = await _run(command, lambda _line: None)
    return found


async def _run(command: Sequence[str], look: Look) -> Any:
    reading, writing = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *_PYTHON,
            str(_HERE / "low_priority.py"),
            str(os.getpid()),
            *command,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            pass_fds=(writing,),
            env={**os.environ, PROGRESS_FD: str(writing)},
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    watch = asyncio.create_task(_watch(reading, look))
    try:
        answer, complaint = await process.communicate()
        await watch
    finally:
        await _end(process)
        watch.cancel()
    if process.returncode != 0:
        raise RuntimeFailure(_reason(process.returncode or 0, complaint.decode(errors="replace")))
    return json.loads(answer)


async def _watch(descriptor: int, look: Look) -> None:
    """Hand lines on until the command has ended."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    try:
        async for line in reader:
            look(json.loads(line))
    finally:
        transport.close()


async def _end(process: Process) -> None:
    """End a command that still runs: it tidies up first, unless that takes long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(number)
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()


def _reason(status: int, said: str) -> str:
    """Make one sentence of what a command said before it failed, or of what it died of."""
    if complaint := find_complaint(said):
        return complaint[0]
    if status == -signal.SIGKILL:
        return "the system ended it, as it does where memory is short; close other programs"
    how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    last = said.strip().rpartition("\n")[2]
    return f"it ended by itself ({how}){f': {last}' if last else ''}"
