"""What a server meets on an open network: it answers without a 5xx, and goes on."""

from __future__ import annotations

import hmac
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.gate import Access
from tests.support.malformed_requests import make_request
from tests.support.serving import Serving, make_served_gguf

pytestmark = pytest.mark.llama

KEY = "a-key-that-is-not-guessed"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = 48 << 20  # bytes that a server may keep after all of it


@pytest.fixture(scope="module")
def gguf(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_gguf(models_dir, tmp_path_factory.mktemp("served") / "base.gguf")


@pytest.fixture
def server(gguf: Path) -> Iterator[Serving]:
    with Serving(gguf, "--max-tokens", 4, "--ctx", 256, "--queue", 64, key=KEY) as server:
        yield server


def send(server: Serving, raw: bytes) -> bytes:
    """Send bytes and take what comes back; what has no end is not waited for."""
    answer = b""
    with (
        suppress(TimeoutError, ConnectionError),
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as client,
    ):
        client.sendall(raw)
        # An incomplete request gets no answer, and this client no patience.
        client.settimeout(10 if b"Connection: close\r\n" in raw else 0.05)
        first = client.recv(1 << 16) if is_complete(raw) else b""
        while part := first:
            answer += part
            first = client.recv(1 << 16)
    return answer


def is_complete(raw: bytes) -> bool:
    """Whether the bytes are likely to get an answer."""
    head, blank, body = raw.partition(b"\r\n\r\n")
    if b"chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)(\r\n|$)", head)
    return bool(blank) and (length is None or len(body) >= int(length[1]))


def attack(server: Serving, folder: Path, count: int) -> Counter[str]:
    """Send many malformed requests, and see that each answer is in order."""
    telling = (b"Traceback", b'File "', b"site-packages", str(folder).encode())

    def ask(seed: int) -> str:
        answer = send(server, make_request(seed, KEY))
        assert not any(word in answer for word in telling), (seed, answer)
        status = answer[9:12].decode() if answer else "none"
        assert status == "none" or (answer.startswith(b"HTTP/1.1 ") and status < "500"), (
            seed,
            answer,
        )
        return status

    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(ask, range(count)))


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_requests_leave_it_serving(server: Serving, gguf: Path, count: int) -> None:
    document = {"prompt": "Once", "max_tokens": 4, "temperature": 0}
    told = server.post("/v1/completions", document).json["choices"][0]["text"]
    attack(server, gguf.parent, 100)  # the first ones fill caches
    before = server.health()["memory"]["rss"]
    counts = attack(server, gguf.parent, count)
    assert {"200", "400", "401", "403", "404", "431"} <= set(counts), counts
    after = server.post("/v1/completions", document)
    assert after.json["choices"][0]["text"] == told
    health = server.health()
    assert health["requests"]["failed"] == 0
    assert health["queue"] | {"running": 0, "waiting": 0} == health["queue"]
    assert health["memory"]["rss"] < before + MEMORY
    assert "Traceback" not in server.log()


def test_it_listens_on_this_machine_only(server: Serving) -> None:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    places = [line.split()[1] for line in lines if line.split()[3] == "0A"]  # listening
    assert [place for place in places if place.endswith(f":{server.port:04X}")] == [
        f"0100007F:{server.port:04X}"
    ]


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compare_digest = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return compare_digest(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    access = Access(KEY)
    for shown in ("", "a", KEY[:-1], KEY + "x", "\xff", "x" * len(KEY)):
        with pytest.raises(Refusal, match="missing or wrong"):
            access.check("/v1/models", {"authorization": f"Bearer {shown}"})
    assert all(b == KEY.encode() for _, b in seen)
    assert len(seen) == 6  # for every one, whatever its length


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param("{{ messages }}" + LOOPS, "it takes more than 5 s", marks=pytest.mark.slow),
        ("{{ messages[0].content * 10 ** 10 }}", "it takes more than 128 MiB of memory"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
    ],
    ids=["time", "memory", "escape"],
)
def test_a_hostile_chat_template_ends_one_request(
    models_dir: Path, tmp_path: Path, template: str, reason: str
) -> None:
    recipe = make_recipe("passthrough", [(str(models_dir / "base"), None)], out_type="F32")
    merge(replace(recipe, chat_template=template), tmp_path / "m.gguf")
    with Serving(tmp_path / "m.gguf") as server:
        chat = {"messages": [{"role": "user", "content": "Hi"}]}
        answer = server.post("/v1/chat/completions", chat)
        assert answer.status == 400
        assert reason in answer.error["message"]
        assert str(tmp_path) not in answer.error["message"]
        answer = server.post("/v1/completions", {"prompt": "Once", "max_tokens": 2})
        assert answer.status == 200
        assert "Traceback" not in server.log()
