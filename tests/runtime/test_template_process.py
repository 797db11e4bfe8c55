"""Templates that take all they can get: each ends in one sentence, soon, and nothing stays behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.runtime import template_process
from edgemerge.runtime.template import Template
from edgemerge.runtime.template_process import TemplateOverrun, TemplateProcess, TemplateRefusal

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
    environment = Path(f"/proc/{process._process.pid}/environ").read_bytes()
    assert b"secret" not in environment
    limits = Path(f"/proc/{process._process.pid}/limits").read_text().splitlines()
    hard = {line[:26].strip(): line[26:].split()[1] for line in limits}
    assert hard["Max file size"] == hard["Max processes"] == hard["Max core file size"] == "0"
    assert int(hard["Max address space"]) < 512 << 20


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
