"""Starts and asks `template_child`, the process that runs a chat template; the kernel keeps its limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgemerge.errors import RuntimeFailure

__all__ = ["TemplateOverrun", "TemplateProcess", "TemplateRefusal", "find_template_fault"]

_CHILD = Path(__file__).with_name("template_child.py")
_MAX_SOURCE = 1 << 18  # characters; those of models with tools have 20 000
_MAX_BYTES = 128 << 20  # of memory, beside Python and Jinja themselves
_MAX_SECONDS = 5  # of the processor, for one text
_MAX_TEXT = 1 << 23  # characters; the longest contexts of models have about so many
# What Python needs to start, and the time zone for a template's date. The child forgets all but the last.
_PASSED_ON = ("LD_LIBRARY_PATH", "PYTHONHOME", "TZ")


class TemplateRefusal(Exception):
    """The template raised something, or is no valid Jinja; the text is one line that says why."""


class TemplateOverrun(TemplateRefusal):
    """The template took too much, of time or of memory or of room."""


class TemplateProcess:
    """A template that writes texts; its process starts at once and ends with this object.

    Parameters
    ----------
    source : str
        Jinja.

    Raises
    ------
    TemplateRefusal
        It is no valid Jinja.
    TemplateOverrun
        It is too long, or takes too much even to compile.
    RuntimeFailure
        There is no Jinja, or no room for another process.
    """

    def __init__(self, source: str) -> None:
        if len(source) > _MAX_SOURCE:
            raise TemplateOverrun(f"it has more than {_MAX_SOURCE} characters")
        self._source = source
        self._start()

    def render(self, names: Mapping[str, Any]) -> str:
        """Write a text; one at a time.

        Parameters
        ----------
        names : mapping
            What the template finds: `messages` and so on, as JSON has it.

        Raises
        ------
        TemplateRefusal
            The template fails, or refuses these messages.
        TemplateOverrun
            It takes too much; the next text gets a new process.
        """
        if self._process.poll() is not None:
            self._start()
        return self._ask(names)

    def close(self) -> None:
        """End the process; `render` would start another."""
        self._end()

    def _start(self) -> None:
        folders = _folders_of("jinja2", "markupsafe")
        limits = (_MAX_BYTES, _MAX_SECONDS, _MAX_TEXT)
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        try:
            self._process = subprocess.Popen(
                # With -P nothing in the folder of the file is taken for a module.
                [sys.executable, "-P", str(_CHILD), *map(str, limits), *folders],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise RuntimeFailure(
                f"the chat template needs a process of its own, which cannot start "
                f"({error.strerror}): end other programs"
            ) from error
        self._end = weakref.finalize(self, _end, self._process)
        self._ask(self._source)

    def _ask(self, question: object) -> str:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""  # it ended, which is told below
        except BaseException:  # Ctrl-C: its answer would be taken for that of the next question
            self._end()
            raise
        if not line.endswith(b"\n"):
            self._end()
            raise TemplateOverrun(_explain_end(process.returncode))
        answer = json.loads(line)
        if "error" in answer:
            raise (TemplateOverrun if answer["is_overrun"] else TemplateRefusal)(answer["error"])
        return str(answer["text"])


@lru_cache(maxsize=16)  # a search plans one model again and again
def find_template_fault(source: str) -> str | None:
    """Say why Jinja cannot read a chat template; None where it can, or where there is no Jinja to ask.

    Parameters
    ----------
    source : str
        Jinja.
    """
    try:
        TemplateProcess(source).close()
    except TemplateOverrun:  # perhaps for want of memory here and now
        return None
    except TemplateRefusal as refusal:
        return str(refusal)
    except RuntimeFailure:
        return None
    return None


def _folders_of(*packages: str) -> list[str]:
    """Name the folders that packages lie in: the child does not see PYTHONPATH."""
    folders = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeFailure(
                "chat templates need Jinja: install it with pip install 'edgemerge[run]'"
            )
        folders += [str(Path(place).parent) for place in spec.submodule_search_locations]
    return folders


def _explain_end(status: int) -> str:
    """Say what the end of a child means."""
    if status == -signal.SIGXCPU:
        return f"it takes more than {_MAX_SECONDS} s"
    if status < 0:
        return f"it ended the process that ran it, by {signal.Signals(-status).name}"
    return f"the process that ran it failed, as with more than {_MAX_BYTES >> 20} MiB of memory"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child; one that computes does not hear that its input is closed."""
    process.stdout.close()  # type: ignore[union-attr]
    with suppress(BrokenPipeError):  # by what was not written yet
        process.stdin.close()  # type: ignore[union-attr]
    process.kill()
    process.wait()
