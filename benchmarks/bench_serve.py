"""Many clients at once on `edgemerge serve`: is any request lost, does memory grow, how long do they wait?

    benchmarks/bench_serve.py model.gguf [--clients 64] [--seconds 60] [-- options of edgemerge serve]

Each client asks for a chat answer again and again, every other one as a stream, with prompts of 20 to
200 words. A client that is refused (429, 503) waits as long as the server says, then asks anew. A
request is lost when its connection breaks or its answer is not complete. Figures of time are the
clients': `first token` is from sending a request to its first piece of text, waiting in line included.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from measure import machine, table

WORDS = ["the", "heart", "pumps", "blood", "through", "vessels", "and", "valves", "keep", "flowing"]
TIMEOUT = 300.0  # seconds; a request that takes longer counts as lost


@dataclass
class Load:
    """What the clients saw; they add to it under the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    statuses: Counter[int] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def answered(self) -> int:
        return self.statuses[200]


@contextmanager
def running_server(arguments: list[str]) -> Iterator[int]:
    """Give the port of an `edgemerge serve`, stopped by SIGTERM; its exit code must be 0."""
    command = [sys.executable, "-m", "edgemerge", "serve", "--port", "0", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline() if server.stdout else ""
        found = re.search(r"http://\S+:(\d+)", line)
        if not found:
            raise SystemExit("the server did not start")
        yield int(found[1])
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()
    if server.returncode:
        raise SystemExit(f"the server ended with {server.returncode}")


def ask(port: int, random: np.random.Generator, max_tokens: int, load: Load) -> float:
    """Send one request; returns seconds to wait before the next."""
    words = " ".join(random.choice(WORDS, random.integers(20, 200)))
    stream = bool(random.integers(2))
    body = {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": max_tokens,
        "stream": stream,
        "stream_options": {"include_usage": True},
    }
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    begin = time.monotonic()
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        first, tokens = 0.0, 0
        if answer.status == 200 and stream:
            first, tokens = read_stream(answer, begin)
        else:
            document = json.loads(answer.read())
            tokens = document["usage"]["completion_tokens"] if answer.status == 200 else 0
        with load.lock:
            load.statuses[answer.status] += 1
            load.tokens += tokens
            if answer.status == 200:
                load.answer_s.append(time.monotonic() - begin)
            if first:
                load.first_token_s.append(first)
        return float(answer.headers.get("Retry-After", 0))
    except (OSError, HTTPException, ValueError, KeyError) as error:
        with load.lock:
            load.lost.append(repr(error))
        return 1.0
    finally:
        connection.close()


def read_stream(answer: Iterator[bytes], begin: float) -> tuple[float, int]:
    """Seconds to the first text, and tokens; an incomplete stream is a ValueError."""
    first, tokens, last = 0.0, 0, b""
    for line in answer:
        if line.startswith(b"data: "):
            last = line.removeprefix(b"data: ").strip()
            if last == b"[DONE]":
                return first, tokens
            event = json.loads(last)
            if not first and any(choice["delta"].get("content") for choice in event["choices"]):
                first = time.monotonic() - begin
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    raise ValueError(f"the stream ended with {last!r}")


def read_rss(port: int) -> int:
    """Bytes of the server and of its models' processes."""
    with urlopen(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT) as answer:
        return int(json.load(answer)["memory"]["rss"])


def run_load(port: int, clients: int, seconds: float, max_tokens: int) -> dict[str, object]:
    """Let the clients ask for so long, and tell what they saw, and what memory it took."""
    load = Load()
    ask(port, np.random.default_rng(0), max_tokens, Load())  # the first request fills buffers
    end = time.monotonic() + seconds

    def client(n: int) -> None:
        random = np.random.default_rng(n)
        while (left := end - time.monotonic()) > 0:
            wait = ask(port, random, max_tokens, load)
            time.sleep(min(wait, max(left, 0.0)))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    begin = time.monotonic()
    rss = [read_rss(port)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)
    rss.append(read_rss(port))
    for thread in threads:
        thread.join()
    took = time.monotonic() - begin
    rss.append(read_rss(port))
    return {
        "requests": load.statuses.total() + len(load.lost),
        "answered": load.answered,
        "refused": {str(k): n for k, n in sorted(load.statuses.items()) if k != 200},
        "lost": len(load.lost),
        "errors": load.lost[:5],
        "seconds": took,
        "tokens_per_second": load.tokens / took,
        "first_token_p50_s": quantile(load.first_token_s, 0.5),
        "first_token_p95_s": quantile(load.first_token_s, 0.95),
        "answer_p50_s": quantile(load.answer_s, 0.5),
        "answer_p95_s": quantile(load.answer_s, 0.95),
        "rss_start_mib": rss[0] / 2**20,
        "rss_middle_mib": rss[1] / 2**20,
        "rss_end_mib": rss[2] / 2**20,
    }


def quantile(values: list[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def draw(model: str, clients: int, result: dict[str, Any]) -> str:
    """Return the Markdown table of docs/benchmarks.md."""
    refused = ", ".join(f"{count} with {status}" for status, count in result["refused"].items())
    cells = {
        "model": Path(model).name,
        "clients": clients,
        "s": f"{result['seconds']:.0f}",
        "requests": result["requests"],
        "answered": result["answered"],
        "refused": refused or "none",
        "lost": result["lost"],
        "tokens/s": f"{result['tokens_per_second']:.0f}",
        "first token p50, p95 s": seconds(result, "first_token"),
        "RSS start, middle, end MiB": ", ".join(
            f"{result[f'rss_{when}_mib']:.0f}" for when in ("start", "middle", "end")
        ),
    }
    return table(list(cells), [[str(value) for value in cells.values()]])


def seconds(result: dict[str, Any], name: str) -> str:
    both = (result[f"{name}_p50_s"], result[f"{name}_p95_s"])
    return ", ".join("-" if value is None else f"{value:.1f}" for value in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF file with a chat template")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    parser.add_argument("server_options", nargs="*", help="options of edgemerge serve, after --")
    options = parser.parse_args()
    with running_server([options.model, *options.server_options]) as port:
        result = run_load(port, options.clients, options.seconds, options.tokens)
    print(draw(options.model, options.clients, result))
    print(json.dumps({"machine": machine(), **result}))
    if result["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
