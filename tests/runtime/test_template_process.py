"""Templates that take all they can get: each ends in one sentence, soon, and nothing stays behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.formats import template_process
from edgemerge.formats.template_process import (
    TemplateOverrun,
    TemplateProcess,
    TemplateRefusal,
    find_template_fault,
)
from edgemerge.runtime.template import Template

pytestmark = pytest.mark.llama  # Jinja comes with llama-cpp-python

TALK = [{"role": "user", "content": "Hi"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = (
    "{% set ns = namespace(x='a' * 1000) %}"
    "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_MAX_SECONDS", 1)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (LOOPS, "it takes more than 1 s"),
        ("{{ 'a' * 10 ** 10 }}", "128 MiB of memory"),
        ("{{ messages[0].content * 10 ** 10 }}", "128 MiB of memory"),
        ("{{ [0] * 10 ** 9 }}", "128 MiB of memory"),
        ("{{ '%10000000000d' % 1 }}", "128 MiB of memory"),
        ("{{ '{:>10000000000}'.format(1) }}", "128 MiB of memory"),
        ("{{ 'a' | center(10 ** 10) }}", "128 MiB of memory"),
        (DOUBLES, "128 MiB of memory"),
        ("{{ 9 ** (9 ** 9) }}", "it takes more than 1 s"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "8388608 characters"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ " + "(" * 100_000 + ")" * 100_000 + " }}", ""),
        ("a" * 300_000, "it has more than 262144 characters"),
    ],
)
def test_it_ends_in_one_sentence(source: str, reason: str) -> None:
    start = time.monotonic()
    with pytest.raises(FormatError) as caught:
        Template(source, Path("model.gguf")).render(TALK)
    message = str(caught.value)
    assert message.startswith("model.gguf: its chat template does not work (")
    assert message.endswith("); give another with --template FILE")
    assert reason in message
    assert message.isprintable()
    assert time.monotonic() - start < 20


def test_an_overrun_does_not_spoil_the_next_text() -> None:
    process = TemplateProcess("{% if slow %}" + LOOPS + "{% endif %}ok")
    for _ in range(2):
        with pytest.raises(TemplateOverrun):
            process.render({"slow": True})
        assert process.render({"slow": False}) == "ok"


def test_many_texts_have_their_time_each() -> None:
    """The limit is one text's, not the process's."""
    loops = "{% for i in range(99999) %}{{ '' }}{% endfor %}ok"
    process = TemplateProcess(loops)
    first = process._process.pid
    for _ in range(150):
        assert process.render({}) == "ok"
    assert process._process.pid == first


def test_an_overrun_of_the_probe_is_no_answer() -> None:
    """A template that hangs on system prompts is not taken for one that has no place for them."""
    source = "{% if messages[0].role == 'system' %}" + LOOPS + "{% endif %}ok"
    template = Template(source, Path("model.gguf"))
    with pytest.raises(FormatError, match="it takes more than 1 s"):
        template.render([{"role": "system", "content": "Be brief."}, *TALK])
    assert template.render(TALK) == "ok"


def test_what_is_said_comes_through_as_it_is() -> None:
    said = {"messages": [{"role": "user", "content": 'é \U0001f600 \ud800 \n\r\x00 "'}]}
    assert (
        TemplateProcess("{{ messages[0].content }}").render(said) == said["messages"][0]["content"]
    )


def test_it_has_neither_keys_nor_files() -> None:
    with patch.dict(os.environ, {"EDGEMERGE_API_KEY": "secret", "HF_TOKEN": "secret"}):
        process = TemplateProcess("x")
    limits = Path(f"/proc/{process._process.pid}/limits").read_text().splitlines()
    hard = {line[:26].strip(): line[26:].split()[1] for line in limits}
    closed = ("Max file size", "Max processes", "Max core file size", "Max open files")
    assert [hard[name] for name in closed] == ["0"] * 4
    assert int(hard["Max address space"]) < 512 << 20


ESCAPE = """
import ctypes, importlib.util, os, socket, subprocess, sys, threading

spec = importlib.util.spec_from_file_location("template_child", {child!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
make = module._make_environment

def escape(code):
    found = dict(ctypes=ctypes, os=os, socket=socket, subprocess=subprocess, threading=threading)
    try:
        exec(code, found)
    except Exception as error:
        return type(error).__name__ + " " + str(getattr(error, "errno", error))
    return found.get("result", "done")

def make_leaky():
    environment = make()
    environment.globals["escape"] = escape
    return environment

module._make_environment = make_leaky
module._main(*map(int, sys.argv[1:4]))
"""


@pytest.fixture
def escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Runs Python in the child, as a template would that found a hole in Jinja's sandbox."""
    child = tmp_path / "child.py"
    child.write_text(ESCAPE.format(child=str(template_process._CHILD)))
    monkeypatch.setattr(template_process, "_CHILD", child)
    monkeypatch.setenv("EDGEMERGE_API_KEY", "secret")
    process = TemplateProcess("{{ escape(code) }}")
    return lambda code: process.render({"code": code})


# From 3.13 on, subprocess uses posix_spawn where the C library can close files with it.
SPAWN_NUMBERS = frozenset(
    {errno.EMFILE, errno.EBADF} if sys.version_info >= (3, 13) else {errno.EMFILE}
)


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("open('/etc/hostname').read()", errno.EMFILE),
        ("os.close(2); os.open('/etc/hostname', os.O_RDONLY)", errno.EMFILE),
        ("open('/proc/self/environ').read()", errno.EMFILE),
        ("open(f'/proc/{os.getppid()}/environ').read()", errno.EMFILE),
        ("os.listdir('/')", errno.EMFILE),
        ("socket.socket()", errno.EMFILE),
        ("os.pipe()", errno.EMFILE),
        ("os.fork() or os._exit(0)", errno.EAGAIN),
        ("subprocess.run(['/bin/true'])", SPAWN_NUMBERS),
        ("os.posix_spawn('/bin/true', ['true'], {})", errno.EAGAIN),
        ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))", None),
    ],
)
def test_code_that_escapes_the_sandbox_opens_and_starts_nothing(
    escaped: Callable[[str], str], code: str, number: int | frozenset[int] | None
) -> None:
    """It could read every file of the user, and the environment of the process that started it."""
    told = escaped(code)
    if number is None:
        assert "not allowed to raise maximum limit" in told or told.endswith(f" {errno.EPERM}")
    else:
        numbers = number if isinstance(number, frozenset) else {number}
        assert int(told.split()[-1]) in numbers, told


def test_code_that_escapes_the_sandbox_starts_no_thread(escaped: Callable[[str], str]) -> None:
    assert "can't start new thread" in escaped("threading.Thread(target=print).start()")


def test_code_that_escapes_the_sandbox_sees_no_environment(escaped: Callable[[str], str]) -> None:
    assert escaped("result = sorted(os.environ.keys() - {'TZ'})") == "[]"
    assert escaped("result = ctypes.CDLL(None).getenv(b'EDGEMERGE_API_KEY')") == "0"


def test_code_that_escapes_the_sandbox_removes_nothing(
    escaped: Callable[[str], str], tmp_path: Path
) -> None:
    """Landlock forbids it; to root's child the permissions do, since it is nobody."""
    precious = tmp_path / "precious"
    precious.touch()
    told = escaped(f"os.unlink({str(precious)!r})")
    if told == "done":
        pytest.skip("removing files stays possible: this kernel has no Landlock")
    assert told == f"PermissionError {errno.EACCES}"
    assert precious.exists()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ {'a': [1]} | pprint }}", "{'a': [1]}"),
        ("{{ 'a b' | wordwrap(1) }}", "a\nb"),
        ("{{ '<b>&amp;</b>' | striptags }}", "&"),
        ("{{ lipsum(n=1, html=false) | length > 9 }}", "True"),
        ("{{ '\\N{BULLET}\\u2022' }}", "\u2022\u2022"),
        ("{{ ['b', 'a'] | sort | join | urlencode | title }}", "Ab"),
    ],
)
def test_what_jinja_imports_late_is_there(source: str, text: str) -> None:
    """No file can be opened any more when a template asks for it."""
    assert TemplateProcess(source).render({}) == text


def test_the_time_zone_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    hours = []
    for zone in ("Etc/GMT-5", "Etc/GMT+5"):
        monkeypatch.setenv("TZ", zone)
        hours.append(int(TemplateProcess("{{ strftime_now('%H') }}").render({})))
    assert (hours[0] - hours[1]) % 24 in (9, 10)


def test_it_ends_with_its_owner() -> None:
    process = TemplateProcess("x")
    child = process._process
    process.close()
    assert child.returncode is not None
    assert process.render({}) == "x"  # in another one
    child = process._process
    del process
    gc.collect()
    assert child.returncode is not None


def test_ctrl_c_ends_it_and_the_next_answer_is_its_own() -> None:
    process = TemplateProcess("{% if slow %}" + LOOPS + "{% endif %}{{ n }}")
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        process.render({"slow": True})
    timer.join()
    assert process.render({"n": 7}) == "7"


def test_without_jinja_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "find_spec", lambda name: None)
    with pytest.raises(RuntimeFailure, match=r"pip install 'edgemerge\[run\]'"):
        TemplateProcess("x")


def test_a_refusal_is_no_overrun() -> None:
    with pytest.raises(TemplateRefusal) as caught:
        TemplateProcess("{{ raise_exception('no') }}").render({})
    assert not isinstance(caught.value, TemplateOverrun)


def test_only_what_jinja_cannot_read_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    find_template_fault.cache_clear()
    assert find_template_fault("{{ messages[0].content }}{{ raise_exception('no') }}") is None
    assert find_template_fault("{% if x %}") is not None
    assert find_template_fault("{% for x in y") is not None
    assert find_template_fault("x" * (1 << 19)) is None  # more than is asked for
    find_template_fault.cache_clear()
    monkeypatch.setattr(template_process, "find_spec", lambda name: None)
    assert find_template_fault("{% if x %}") is None
    find_template_fault.cache_clear()
