"""The process that runs a chat template: little memory, little time, and nothing to steal.

Jinja's sandbox keeps a template from Python's insides, not from `"a" * 10**10` or from loops within
loops, and nothing can stop those from within the process that runs them. So they run here, under
limits that the kernel keeps. `template_process` starts this file by its path, for this imports Jinja
only: edgemerge and NumPy would cost the start-up a second on a small board.

Should Jinja's sandbox have a hole, what comes through it finds this, from before the template is read:

- No file, folder, socket or pipe can be opened (`RLIMIT_NOFILE` is 0), and none is open but the three to
  the parent. Nothing can be written to a file (`RLIMIT_FSIZE`).
- No process or thread can be started (`RLIMIT_NPROC`). The kernel exempts root, so root becomes `nobody`
  first, unless it is not allowed to. A program that is run in the place of this one has the same limits.
- The environment has the time zone and nothing else. No other user's process can look into this one.
- Where the kernel has Landlock (Linux 5.13), no file can be renamed or removed, and the memory of the
  parent cannot be read. Elsewhere both stay possible, as far as the user may do so.

Signals to processes of the same user stay possible, and so does asking which files exist. Seccomp would close
both; no binding to it is kept up for Python.

Its arguments are the limits: bytes of memory beside what it begins with, seconds of the processor and
characters for one text; then folders to find Jinja in. Lines of JSON come on stdin: first the template's
source, then for each text the names that the template finds. Each is answered by one line:
`{"text": ...}`, or `{"error": ...}` with whether a limit was met (`is_overrun`).
"""

from __future__ import annotations

import codecs
import ctypes
import html
import json
import os
import pprint
import resource
import signal
import sys
import textwrap
import time
import unicodedata
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

sys.path += sys.argv[4:]

from jinja2 import Template, constants, debug, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__: list[str] = []

# What Jinja and Python import only when a template asks for it: later no file can be opened.
_PRELOADED = (
    constants,
    debug,
    html,
    pprint,
    textwrap,
    unicodedata,
    codecs.lookup("unicode-escape"),
)
_NOBODY = 65534
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # the same on all processors
_LANDLOCK_ACCESS_FS = (1 << 13) - 1  # all rights on files that Landlock's first version knows


class _TooLong(Exception):
    """The text is longer than it may be."""


class _Generation(Extension):
    """`{% generation %}` marks for training what the model said; here it only has a content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration is not a ClassVar)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _make_environment() -> ImmutableSandboxedEnvironment:
    """Set Jinja up as transformers does for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    return environment


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is; Jinja's own filter would write < and & for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _main(max_bytes: int, max_seconds: int, max_text: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is ours
    _limit_process(max_bytes)
    template: Template | None = None
    for line in sys.stdin:
        _limit_time(max_seconds)
        try:
            if template is None:
                template = _make_environment().from_string(json.loads(line))
                text = ""
            else:
                text = _render(template, json.loads(line), max_text)
            answer: dict[str, Any] = {"text": text}
        except MemoryError:
            reason = f"it takes more than {max_bytes >> 20} MiB of memory"
            answer = {"error": reason, "is_overrun": True}
        except _TooLong as error:
            answer = {"error": str(error), "is_overrun": True}
        except Exception as error:  # a stranger's code: it may raise anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            answer = {"error": lines[0][:200], "is_overrun": False}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _limit_process(max_bytes: int) -> None:
    """Close what the docstring above says is closed."""
    time.localtime()  # reads the time zone
    for name in os.environ.keys() - {"TZ"}:
        del os.environ[name]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _give_up_rights()
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    most = pages * resource.getpagesize() + max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for limit in (
        resource.RLIMIT_NOFILE,
        resource.RLIMIT_FSIZE,
        resource.RLIMIT_NPROC,
        resource.RLIMIT_CORE,
    ):
        resource.setrlimit(limit, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _give_up_rights() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    handled = ctypes.c_uint64(_LANDLOCK_ACCESS_FS)
    size = ctypes.c_size_t(ctypes.sizeof(handled))
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(handled), size, 0)
    if ruleset >= 0:  # of no rule: nothing is allowed
        libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    if os.geteuid() == 0:
        with suppress(OSError):  # a root without that right, in some containers
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _limit_time(max_seconds: int) -> None:
    """Give one more text its time; the kernel ends the process after it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + 1 + max_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _render(template: Template, names: dict[str, Any], max_text: int) -> str:
    pieces, length = [], 0
    for piece in template.generate(**names):
        length += len(piece)
        if length > max_text:
            raise _TooLong(f"it writes more than {max_text} characters")
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:4]))
