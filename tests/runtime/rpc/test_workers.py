"""One model on several workers: the same answers, and one sentence when a worker is lost.

A model that has workers changes its process, so each is in one of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.rpc_workers import PATIENCE, RpcWorker, why_not
from tests.support.serving import Serving, make_served_gguf
from tests.support.talking import COMMAND, SLOWLY

pytestmark = pytest.mark.llama

ROUTE = "/v1/completions"
QUESTION = {"prompt": "diabetes is a", "temperature": 0, "max_tokens": 24}
BUFFERS = """
import json, socket, sys
from pathlib import Path
from edgemerge.runtime.llama import Model
from edgemerge.runtime.rpc import backend
model, layers, *addresses = sys.argv[1:]
with Model(model, rpc=addresses, n_gpu_layers=None if layers == "all" else int(layers)) as loaded:
    links = list(backend._sockets())
    kept = [link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for link in links]
    sizes = {place: size for (place, kind), size in loaded.buffers.sizes.items() if kind == "model"}
    print(json.dumps({"sizes": sizes, "kept": kept, "threads": loaded.threads.generate}))
"""


@pytest.fixture(scope="module", autouse=True)
def _backend() -> None:
    pytest.importorskip("llama_cpp")
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def model(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_gguf(models_dir, tmp_path_factory.mktemp("rpc") / "base.gguf")


@pytest.fixture
def two() -> Iterator[tuple[RpcWorker, RpcWorker]]:
    with RpcWorker() as first, RpcWorker() as second:
        yield first, second


def _joined(workers: tuple[RpcWorker, ...]) -> str:
    return ",".join(worker.address for worker in workers)


def _call(*arguments: object, command: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def _answer(model: Path, *more: object) -> str:
    given = ("-p", "diabetes is a", "--raw", "-n", 40, "--temp", 0, "--json")
    told = _call("run", model, *given, *more)
    assert told.returncode == 0, told.stderr
    text: str = json.loads(told.stdout)["text"]
    return text


def test_two_workers_answer_as_one_and_as_none(
    model: Path, two: tuple[RpcWorker, RpcWorker]
) -> None:
    alone = _answer(model)
    assert len(alone) > 20
    assert _answer(model, "--rpc", two[0].address) == alone
    assert _answer(model, "--rpc", _joined(two)) == alone
    assert _answer(model, "--rpc", _joined(two), "-g", 2) == alone


def test_weights_are_on_the_workers(model: Path, two: tuple[RpcWorker, RpcWorker]) -> None:
    def load(layers: str) -> Any:
        addresses = [worker.address for worker in two]
        command = [sys.executable, "-c", BUFFERS, str(model), layers, *addresses]
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
        return json.loads(told.stdout)

    found = load("all")
    on_workers = [size for place, size in found["sizes"].items() if place.startswith("RPC")]
    assert len(on_workers) == 2
    assert all(size > 0 for size in on_workers)
    assert found["kept"] == [1, 1]  # a board without power is noticed
    few = load("1")["sizes"]
    assert sum(size for place, size in few.items() if place.startswith("RPC")) < sum(on_workers)


def test_run_ends_with_one_sentence(model: Path, two: tuple[RpcWorker, RpcWorker]) -> None:
    arguments = ["run", str(model), "-p", "the", "--raw", "-n", "0", "--rpc", _joined(two)]
    running = subprocess.Popen(
        [*SLOWLY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.read(4)
    two[1].kill()
    _, written = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    assert written == (
        f"edgemerge: the rpc worker at {two[1].address} is gone: start it again with edgemerge rpc-worker\n"
    )


def test_bench_ends_with_one_sentence(model: Path, two: tuple[RpcWorker, RpcWorker]) -> None:
    arguments = ["bench", str(model), "-p", "0", "-n", "8", "-r", "1000000", "--rpc", _joined(two)]
    running = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    two[0].wait_until_used()
    two[0].kill()
    out, written = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    assert out == ""
    assert written.endswith(
        f"while it was measured, the rpc worker at {two[0].address} is gone: "
        "start it again with edgemerge rpc-worker\n"
    )
    assert written.count("\n") == 1


def test_eval_and_chat_use_workers(
    model: Path, eval_dir: Path, two: tuple[RpcWorker, RpcWorker]
) -> None:
    asked = ("eval", model, "--task", eval_dir / "disease.jsonl", "--limit", 5, "--json")
    scores = [_call(*asked, *more) for more in ((), ("--rpc", _joined(two)))]
    alone, split = (json.loads(one.stdout)["results"] for one in scores)
    assert split[0]["acc"] == alone[0]["acc"]
    talk = subprocess.run(
        [*COMMAND, "chat", str(model), "--temp", "0", "-n", "4", "--rpc", _joined(two)],
        input="hello\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert talk.returncode == 0, talk.stderr


def test_the_server_stays_and_goes_on(model: Path, two: tuple[RpcWorker, RpcWorker]) -> None:
    with Serving(model, "--rpc", _joined(two)) as server, ThreadPoolExecutor(1) as pool:
        ask: Callable[[], Any] = lambda: server.post(ROUTE, QUESTION)  # noqa: E731
        first = ask()
        assert first.status == 200
        two[1].pause()  # so that the answer is not done before the worker is
        lost = pool.submit(ask)
        server.wait_until(running=1)
        two[1].kill()
        sentence = f"the rpc worker at {two[1].address} is gone"
        assert lost.result(PATIENCE).status == 503
        assert sentence in lost.result().error["message"]
        assert server.get("/health").status in (200, 503)
        without = ask()
        assert without.status == 500
        assert f"there is no rpc worker at {two[1].address}" in server.log()
        assert sentence in server.log()
        with RpcWorker(two[1].address):
            again = ask()
        assert again.json["choices"][0]["text"] == first.json["choices"][0]["text"]


def test_a_stream_ends_with_the_sentence(model: Path, two: tuple[RpcWorker, RpcWorker]) -> None:
    with Serving(model, "--rpc", _joined(two)) as server, ThreadPoolExecutor(1) as pool:
        assert server.post(ROUTE, QUESTION | {"max_tokens": 1}).status == 200
        two[0].pause()
        stream = pool.submit(server.post, ROUTE, QUESTION | {"stream": True})
        server.wait_until(running=1)
        two[0].kill()
        body = stream.result(PATIENCE).body.decode()
        assert f"the rpc worker at {two[0].address} is gone" in body


def test_a_worker_ends_at_a_signal_and_keeps_stdout_to_itself(model: Path) -> None:
    with RpcWorker() as worker:
        _answer(model, "--rpc", worker.address)
        worker.process.send_signal(signal.SIGTERM)
        out, errors = worker.process.communicate(timeout=PATIENCE)
        assert worker.process.returncode == 128 + signal.SIGTERM
        assert out == ""
        assert errors == "edgemerge: interrupted\n"
        assert worker.line == f"edgemerge rpc-worker listens at {worker.address} (1 thread)\n"


def test_an_address_in_use_is_refused() -> None:
    with RpcWorker() as worker:
        told = _call("rpc-worker", "--listen", worker.address)
    assert told.returncode == 1
    assert f"{worker.address} cannot be listened on (Address already in use)" in told.stderr
