"""Tokens per second of `edgemerge serve` beside llama.cpp's own llama-server, for one client and for many.

    benchmarks/bench_server.py MODEL.gguf --llama-server PATH/llama-server
    benchmarks/bench_server.py MODEL.gguf --peers .venv-peers

All run at the same time with the same threads, context and places. llama-server runs twice: with its context
cut into a part for each place, and as one cache (--kv-unified), where a single request may use all of it as
with ours. One of them is asked at a time, by the same client: as many requests at once as there are clients,
each with a prompt that was never asked before. They take turns, so that what else the machine does hits all
alike. One client more has a text repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from bench_serve import TIMEOUT, quantile, read_stream, running_server
from measure import llama_program, machine, table

PLACES, CONTEXT = 16, 8192
START_SECONDS = 60
SIDES = ("ours", "parted", "unified")
COPYING = "1, a copy"
ALONE_OFTEN = 4  # a single answer takes half a second, which other programs disturb by 7 %
TEXT = (
    "The heart pumps blood through the vessels of the body. Valves between its chambers keep the blood "
    "flowing in one direction. When a valve does not close well, blood leaks back, and the heart has to work "
    "harder."
)


@dataclass
class Seen:
    """What clients saw of one server, over all rounds."""

    rates: list[float] = field(default_factory=list)  # tokens per second of each round
    first_token_s: list[float] = field(default_factory=list)


@contextmanager
def running_llama_server(
    program: Path, model: str, threads: int, port: int, cache: str
) -> Iterator[int]:
    """Give the port of a llama-server, which is killed at the end."""
    settings = {"-m": model, "-t": threads, "-c": CONTEXT, "-np": PLACES, "--port": port}
    words = [str(word) for pair in settings.items() for word in pair]
    server = subprocess.Popen(
        [program, *words, cache, "--no-webui"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until_ready(server, port)
        yield port
    finally:
        server.kill()
        server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise SystemExit("llama-server did not start")


def ask(port: int, prompt: str, max_tokens: int) -> tuple[float, int]:
    """Send one request; give the seconds to its first text, and its tokens."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.monotonic()
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"a server answered with {answer.status}: {answer.read()!r}")
    found = read_stream(answer, begin)
    connection.close()
    return found


def ask_together(port: int, prompts: list[str], max_tokens: int, seen: Seen) -> None:
    """Ask all at once; note what came."""
    answers: list[tuple[float, int]] = []
    threads = [
        threading.Thread(target=lambda prompt=prompt: answers.append(ask(port, prompt, max_tokens)))
        for prompt in prompts
    ]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(answers) != len(prompts):
        raise SystemExit("a request was lost")
    seen.rates.append(sum(tokens for _, tokens in answers) / (time.monotonic() - begin))
    seen.first_token_s += [first for first, _ in answers]


def compare(ports: dict[str, int], options: argparse.Namespace) -> list[dict[str, str | float]]:
    """Take turns, each first in every third; one row for each kind of load."""
    numbers = iter(range(10_000))
    for port in ports.values():  # the first requests fill buffers
        ask_together(port, ["Hello", "Good morning"], 8, Seen())
    kinds = [*map(str, options.clients), COPYING]
    seen = {kind: {side: Seen() for side in SIDES} for kind in kinds}
    for kind in kinds * options.rounds:
        for _ in range(ALONE_OFTEN if kind in ("1", COPYING) else 1):
            prompts = make_prompts(kind, numbers)
            turn = len(seen[kind]["ours"].rates)
            for i in range(len(SIDES)):
                side = SIDES[(turn + i) % len(SIDES)]
                ask_together(ports[side], prompts, options.tokens, seen[kind][side])
    return [row(kind, seen[kind]) for kind in kinds]


def make_prompts(kind: str, numbers: Iterator[int]) -> list[str]:
    if kind == COPYING:
        return [f"Repeat text {next(numbers)} word for word:\n{TEXT}"]
    return [
        f"Tell me about the number {next(numbers)}, in some detail and with examples."
        for _ in range(int(kind))
    ]


def row(clients: str, seen: dict[str, Seen]) -> dict[str, str | float]:
    found: dict[str, str | float] = {"clients": clients}
    for side, one in seen.items():
        found[side] = statistics.median(one.rates)
        found[f"{side}_best"] = max(one.rates)
        found[f"{side}_first_p95_s"] = quantile(one.first_token_s, 0.95) or 0.0
    return found


def draw(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table of docs/benchmarks.md."""
    header = [
        "clients",
        "edgemerge serve, tokens/s",
        "llama-server, tokens/s",
        "ratio of medians, of the best",
        "llama-server --kv-unified, tokens/s",
        "ratio of medians, of the best",
        "first token p95, s: edgemerge",
        "llama-server",
        "--kv-unified",
    ]
    cells = []
    for row in rows:
        ratios = [
            f"{row['ours'] / row[side]:.2f}, {row['ours_best'] / row[f'{side}_best']:.2f}"
            for side in SIDES[1:]
        ]
        first = [f"{row[f'{side}_first_p95_s']:.2f}" for side in SIDES]
        ours, parted, unified = (f"{row[side]:.0f}" for side in SIDES)
        cells.append([row["clients"], ours, parted, ratios[0], unified, ratios[1], *first])
    return table(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF file with a chat template")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--llama-server", type=Path, help="the program")
    place.add_argument("--peers", type=Path, help="where benchmarks/make-llama-programs builds it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    options = parser.parse_args()
    program = options.llama_server or llama_program("llama-server", options.peers)
    settings = {"--threads": options.threads, "--ctx": CONTEXT, "--parallel": PLACES}
    words = [str(word) for pair in settings.items() for word in pair]
    with ExitStack() as stack:
        ports = {
            "ours": stack.enter_context(running_server([options.model, *words])),
            "parted": stack.enter_context(
                running_llama_server(program, options.model, options.threads, 8098, "-no-kvu")
            ),
            "unified": stack.enter_context(
                running_llama_server(program, options.model, options.threads, 8099, "-kvu")
            ),
        }
        rows = compare(ports, options)
    print(draw(rows))
    about = {"model": Path(options.model).name, "threads": options.threads}
    print(json.dumps({"machine": {**about, **machine()}, "rows": rows}))


if __name__ == "__main__":
    main()
