from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from edgemerge.errors import EdgemergeError
from edgemerge.runtime.engine.messages import Begun, Generation
from edgemerge.runtime.engine.options import EngineOptions
from edgemerge.runtime.engine.process import EngineFailure, ModelProcess
from tests.support.engines import GREEDY, Engine, Told, collect
from tests.support.tiny_gguf import CONTEXT

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path) -> Iterator[Engine]:
    with Engine(tiny_gguf, n_ctx=CONTEXT, n_sequences=8) as opened:
        yield opened


def test_a_model_answers(engine: Engine) -> None:
    told = engine.ask("the answer", 12)
    assert told.begun is not None
    assert told.ended is not None
    assert told.ended.n_generated == 12
    assert told.reason == "length"
    assert told.text
    assert engine.ask("the answer", 12).text == told.text


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF and nothing else")
    process = ModelProcess(EngineOptions(tmp_path / "no.gguf"))
    with pytest.raises(EdgemergeError, match=r"no\.gguf"):
        asyncio.run(process.start())


@pytest.mark.parametrize("prompt", ["", [], [99999], [-1], "x" * 3000])
def test_what_a_model_cannot_take_is_refused(engine: Engine, prompt: str | list[int]) -> None:
    if prompt == "":
        return  # begins with the beginning of sequence
    with pytest.raises(EngineFailure) as caught:
        engine.ask(prompt)
    assert caught.value.status == 400


def test_a_killed_process_is_one_error_for_all_and_starts_again(engine: Engine) -> None:
    async def die() -> list[Told | BaseException]:
        process = engine.process
        asks = [
            asyncio.ensure_future(collect(process, Generation(f"the answer {i}", 20_000, GREEDY)))
            for i in range(7)
        ]
        first = process.generate(Generation("the question", 20_000, GREEDY))
        await anext(first)  # it is computed; a tiny model has soon said all
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineFailure):
            _ = [event async for event in first]
        return await asyncio.gather(*asks, return_exceptions=True)

    for found in engine.run(die()):
        assert isinstance(found, EngineFailure), found
        assert found.status == 503
        assert "SIGKILL" in found.reason
    assert not engine.process.is_alive
    with pytest.raises(EngineFailure):
        engine.ask("the answer")
    engine.run(engine.process.start())
    assert engine.ask("the answer").text


def test_a_left_answer_frees_its_sequence(engine: Engine) -> None:
    async def leave() -> None:
        async with aclosing(engine.process.generate(Generation("the", 200, GREEDY))) as events:
            async for event in events:
                assert isinstance(event, Begun)
                return

    for _ in range(20):  # more often than there are sequences
        engine.run(leave())
    assert engine.ask("the answer").text


def test_tokens_and_back(engine: Engine) -> None:
    process = engine.process
    tokens = engine.run(process.tokenize("the answer", add_special=True))
    assert tokens[0] == 1
    assert engine.run(process.tokenize("the answer", add_special=False)) == tokens[1:]
    assert engine.run(process.detokenize(tokens[1:])).strip() == "the answer"
    with pytest.raises(EngineFailure, match="a token is not"):
        engine.run(process.detokenize([10**6]))


PARENT = """
import asyncio, sys
from pathlib import Path
from edgemerge.runtime.engine.messages import Generation
from edgemerge.runtime.engine.options import EngineOptions
from edgemerge.runtime.engine.process import ModelProcess

async def main():
    process = ModelProcess(EngineOptions(Path(sys.argv[1]), n_ctx=256, n_threads=1))
    await process.start()
    answers = [process.generate(Generation("the answer", 200)) for _ in range(4)]
    for answer in answers:
        await anext(answer)
    print(process.pid, flush=True)
    sys.stdin.read()  # and take no more of what comes

asyncio.run(main())
"""


def test_the_child_ends_with_its_parent(tiny_gguf: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tiny_gguf)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_half_a_character_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineFailure, match="surrogate") as caught:
        engine.ask("the \ud800 answer")
    assert caught.value.status == 400
    assert engine.ask("the answer").text


def test_a_closed_process_is_gone(tiny_gguf: Path) -> None:
    process = ModelProcess(EngineOptions(tiny_gguf, n_ctx=64, n_threads=1))

    async def start_and_close() -> int | None:
        await process.start()
        pid = process.pid
        await process.close()
        return pid

    pid = asyncio.run(start_and_close())
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()
