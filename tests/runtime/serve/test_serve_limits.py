"""What a server does when it is too much: queue, time limits, clients that leave, the end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.support.serving import Answer, Serving, make_served_gguf

pytestmark = pytest.mark.llama

LONG = {"prompt": "Once", "max_tokens": 200, "temperature": 0}  # 4 s at 20 ms a token
SHORT = {"prompt": "Once", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def gguf(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_gguf(models_dir, tmp_path_factory.mktemp("served") / "base.gguf")


@pytest.fixture
def slow(gguf: Path) -> Iterator[Serving]:
    with Serving(gguf, "--queue", 1, "--parallel", 1, slowly=True) as server:
        yield server


def start(server: Serving, document: object) -> socket.socket:
    """Send a completion request and do not wait for the answer."""
    body = json.dumps(document).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(head.encode() + body)
    return client


def test_beyond_the_queue_it_is_busy_and_says_when_to_come_again(slow: Serving) -> None:
    with start(slow, LONG):
        slow.wait_until(running=1)
        with start(slow, SHORT):
            slow.wait_until(running=1, waiting=1)
            answer = slow.post("/v1/completions", SHORT)
            assert answer.status == 429
            assert answer.error["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            models = slow.get("/v1/models")  # does not wait
            assert models.status == 200


def test_a_client_that_leaves_frees_its_place(slow: Serving) -> None:
    first = start(slow, LONG)
    slow.wait_until(running=1)
    second = start(slow, LONG)
    slow.wait_until(waiting=1)
    second.close()
    slow.wait_until(waiting=0, running=1)
    begin = time.monotonic()
    first.close()
    slow.wait_until(running=0)
    assert time.monotonic() - begin < 2.0
    assert slow.post("/v1/completions", SHORT).status == 200


def test_a_client_that_leaves_a_stream_frees_its_place(slow: Serving) -> None:
    client = start(slow, {**LONG, "stream": True})
    assert client.recv(100)
    client.close()
    slow.wait_until(running=0)
    assert slow.post("/v1/completions", SHORT).status == 200
    assert "Traceback" not in slow.log()


def test_time_limits(gguf: Path) -> None:
    limits = ("--request-timeout", 0.4, "--queue-timeout", 0.2, "--parallel", 1)
    with Serving(gguf, *limits, slowly=True) as server:
        with start(server, LONG):
            server.wait_until(running=1)
            waited = server.post("/v1/completions", SHORT)
            assert (waited.status, waited.error["code"]) == (503, "queue_timeout")
        server.wait_until(running=0)
        answer = server.post("/v1/completions", LONG)
        assert (answer.status, answer.error["code"]) == (504, "time_limit")
        assert answer.headers["x-should-retry"] == "false"  # the openai client would ask again
        stream = server.post("/v1/completions", {**LONG, "stream": True})
        assert stream.status == 200  # its beginning was fine
        last = stream.body.strip().splitlines()[-1].removeprefix(b"data: ")
        assert json.loads(last)["error"]["code"] == "time_limit"


def test_the_end_waits_for_the_running_answer_and_not_for_others(gguf: Path) -> None:
    alone = ("--parallel", 1)
    with Serving(gguf, *alone, slowly=True) as server, ThreadPoolExecutor() as pool:
        running = pool.submit(server.post, "/v1/completions", {**LONG, "stream": True})
        server.wait_until(running=1)
        waiting = pool.submit(server.post, "/v1/completions", SHORT)
        server.wait_until(waiting=1)
        server.stop()
        assert waiting.result().status == 503
        assert server.wait() == 0
        assert running.result().body.endswith(b"data: [DONE]\n\n")
        assert running.result().body.count(b"data: ") > 150
        assert server.log() == ""


def test_after_the_grace_the_running_answer_is_cut(gguf: Path) -> None:
    with Serving(gguf, "--grace", 0.3, slowly=True) as server, ThreadPoolExecutor() as pool:
        running = pool.submit(server.post, "/v1/completions", LONG)
        server.wait_until(running=1)
        begin = time.monotonic()
        server.stop()
        assert server.wait() == 0
        assert time.monotonic() - begin < 3.0
        assert running.result().status == 503


def test_of_64_clients_none_is_lost(gguf: Path) -> None:
    def ask(server: Serving, n: int) -> Counter[int]:
        document = {"prompt": f"Number {n} is", "max_tokens": 8, "stream": n % 2 == 0}
        answers = [server.post("/v1/completions", document) for _ in range(8)]
        assert all(map(is_complete, answers))
        return Counter(answer.status for answer in answers)

    with Serving(gguf) as server, ThreadPoolExecutor(64) as pool:
        ask(server, 0)
        before = server.health()["memory"]["rss"]
        counts = sum(pool.map(partial(ask, server), range(64)), Counter[int]())
        assert set(counts) <= {200, 429, 503}
        assert counts[200] >= 64
        assert counts.total() == 64 * 8
        requests = server.health()["requests"]
        assert requests["answered"] == counts[200] + 8
        assert requests["refused"] == counts[429] + counts[503]
        assert requests["failed"] == 0
        assert server.health()["memory"]["rss"] < before + (32 << 20)
        assert server.log() == ""


def is_complete(answer: Answer) -> bool:
    if answer.headers["content-type"].startswith("text/event-stream"):
        return answer.body.endswith(b"data: [DONE]\n\n")
    return "choices" in answer.json or "error" in answer.json


HOSTILE = [
    ("/v1/chat/completions", b"", 400),
    ("/v1/chat/completions", b"{", 400),
    ("/v1/chat/completions", b"\xff\xfe", 400),
    ("/v1/chat/completions", b"[" * 100_000, 400),
    ("/v1/chat/completions", b'{"a":' * 40 + b"1" + b"}" * 40, 400),
    ("/v1/chat/completions", b'{"messages": "hello"}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "user"}], "temperature": "hot"}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ("/v1/completions", b'{"prompt": 7}', 400),
    ("/v1/completions", b'{"prompt": []}', 400),
    ("/v1/completions", b'{"prompt": ""}', 200),  # the model puts its own token in front
    ("/v1/completions", b'{"prompt": [1e99]}', 400),
    ("/v1/completions", b'{"prompt": [-1]}', 400),
    ("/v1/completions", b'{"prompt": [99999999999999999999]}', 400),
    ("/v1/completions", b'{"prompt": "x", "max_tokens": "5"}', 400),
    ("/v1/completions", b'{"prompt": "x", "max_tokens": -5}', 400),
    ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400),
    ("/v1/completions", b'{"prompt": "x", "logprobs": 100000}', 400),
    ("/v1/completions", b'{"prompt": "x", "logit_bias": {"-3": 1}}', 400),
    ("/v1/completions", b'{"prompt": "x", "logit_bias": {"x": 1}}', 400),
    ("/v1/completions", b'{"prompt": "x", "grammar": "root ::= root"}', 400),
    ("/v1/completions", b'{"prompt": "x", "model": ["base"]}', 400),
    ("/v1/completions", b'{"prompt": "x", "model": "../../etc/passwd"}', 404),
    ("/v1/embeddings", b'{"input": {}}', 400),
    ("/detokenize", b'{"tokens": [-1]}', 400),
    ("/detokenize", b'{"tokens": [1000000]}', 400),
    ("/extras/detokenize", b'{"tokens": [1]}', 404),
    ("/admin/reload", b'{"model": "gpt-4"}', 404),
    ("/admin/reload", b"[", 400),
    ("/v1/engines/copilot-codex/completions", b'{"prompt": "x"}', 404),
    ("/v1/nothing", b"{}", 404),
]


@pytest.fixture(scope="module")
def server(gguf: Path) -> Iterator[Serving]:
    with Serving(gguf) as server:
        yield server


@pytest.mark.parametrize(("path", "body", "status"), HOSTILE)
def test_hostile_requests_get_one_sentence(
    server: Serving, path: str, body: bytes, status: int
) -> None:
    answer = server.send(path, body)
    assert answer.status == status
    if status != 200:
        assert answer.error["message"]
        assert set(answer.error) == {"message", "type", "param", "code"}
        assert len(answer.body) < 1000
        assert b"Traceback" not in answer.body
        assert b"site-packages" not in answer.body
    assert server.post("/v1/completions", SHORT).status == 200
    assert "Traceback" not in server.log()


def test_what_is_too_large_is_refused(server: Serving) -> None:
    assert server.send("/v1/completions", b"x" * (2 << 20)).status == 413
    assert server.post("/tokenize", {"prompt": "x" * 100_000}).json["count"] > 10_000
    assert server.get("/health", **{"X-Long": "x" * 100_000}).status == 431


def test_other_sites_pages_are_refused(server: Serving) -> None:
    ask = SHORT
    assert server.post("/v1/completions", ask, Origin="https://evil.example").status == 403
    assert server.post("/v1/completions", ask, Host="evil.example").status == 403
    assert server.post("/v1/completions", ask, Origin=server.url).status == 200
    assert server.get("/", Host="evil.example:80").status == 403
    assert server.get("/", Host=f"localhost:{server.port}").status == 200


def test_a_body_that_never_comes_holds_no_place(server: Serving) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    for client in clients:
        client.sendall(head)
    assert server.post("/v1/completions", SHORT).status == 200
    for client in clients:
        client.close()


def test_threads_may_ask_at_once_for_all_there_is(server: Serving) -> None:
    found: list[int] = []

    def ask(path: str) -> None:
        found.append(server.get(path).status)

    paths = ["/", "/health", "/metrics", "/v1/models", "/tokenizer_info"] * 4
    threads = [threading.Thread(target=ask, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * len(paths)
