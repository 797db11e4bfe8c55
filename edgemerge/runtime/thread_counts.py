"""How many threads generate fastest here, and how many read prompts fastest: measured once, and kept.

One token at a time is bound by memory: on a shared machine with two cores, one thread generates up to
twice as fast as two, while prompts, which are bound by arithmetic, gain from both. What is right depends on
the machine and on the size of the model, so half a second is spent on trying, and the answer kept for a week.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgemerge.errors import OutputError, RuntimeFailure
from edgemerge.machine.caches import users_cache
from edgemerge.output.file import write_file
from edgemerge.runtime.board.processor import processor_fields

__all__ = ["ThreadCounts", "find_threads", "kept_counts"]

SECONDS = 0.25  # for each of the two
MAX_ROUNDS = 7
PROMPT_TOKENS = 32
SLOW = 0.15  # seconds a token from which on prompts are not tried: all threads read them
NEAR = 1.05  # fewer threads win where they take at most so much longer
KEPT_SECONDS = 7 * 24 * 3600
MAX_KEPT = 64


@dataclass(frozen=True, slots=True)
class ThreadCounts:
    """Threads that generate tokens, and threads that read prompts."""

    generate: int
    prompt: int


def find_threads(api: Any, context: Any, *, n_bytes: int, most: int) -> ThreadCounts:
    """Return the counts for a model, and set them in its context.

    Parameters
    ----------
    api : module
        llama_cpp.
    context : pointer
        A context of llama.cpp in which nothing was computed yet; it is left empty.
    n_bytes : int
        Size of the model's weights; models of about one size share what was measured.
    most : int
        Threads at most: cores that this process may use.

    Raises
    ------
    RuntimeFailure
        llama.cpp cannot compute with the model.
    """
    key = f"{_machine()} {most} threads, 2^{n_bytes.bit_length()} bytes"
    counts = kept_counts().get(key)
    if most == 1:
        counts = ThreadCounts(1, 1)
    elif counts is None:
        n_prompt = min(
            PROMPT_TOKENS, api.llama_n_batch(context)
        )  # fewer than asked in a small context
        counts = _measure(api, context, n_prompt, most)
        _keep(key, counts)
    api.llama_set_n_threads(context, counts.generate, counts.prompt)
    return counts


def kept_counts() -> Mapping[str, ThreadCounts]:
    """Read what was measured in the last week, by machine and size of the model."""
    return {
        key: ThreadCounts(entry["generate"], entry["prompt"])
        for key, entry in _read().items()
        if time.time() - entry["at"] < KEPT_SECONDS
    }


def _machine() -> str:
    fields = processor_fields(Path("/"))
    return fields.get("model name") or fields.get("CPU part") or "processor"


def _measure(api: Any, context: Any, n_prompt: int, most: int) -> ThreadCounts:
    candidates = sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i <= most)})

    def decode(n_tokens: int) -> float:
        """Run a batch of the first token; return its seconds."""
        tokens = (ctypes.c_int32 * n_tokens)()
        started = time.perf_counter()
        if api.llama_decode(context, api.llama_batch_get_one(tokens, n_tokens)) != 0:
            raise RuntimeFailure("llama.cpp cannot compute with this model; try another")
        api.llama_synchronize(context)
        seconds = time.perf_counter() - started
        api.llama_memory_clear(api.llama_get_memory(context), False)
        return seconds

    def with_threads(n_tokens: int) -> Callable[[int], float]:
        def run(n_threads: int) -> float:
            api.llama_set_n_threads(context, n_threads, n_threads)
            return decode(n_tokens)

        return run

    decode(1)  # the first reads the weights from disk
    generate, seconds = _fastest(candidates, with_threads(1))
    if seconds > SLOW:
        return ThreadCounts(generate, most)
    prompt, _ = _fastest(candidates, with_threads(n_prompt))
    return ThreadCounts(generate, prompt)


def _fastest(candidates: list[int], run: Callable[[int], float]) -> tuple[int, float]:
    """Try all by turns; return the fewest threads that are about the fastest, and their median time."""
    times: dict[int, list[float]] = {n: [] for n in candidates}
    end = time.perf_counter() + SECONDS
    for i in range(MAX_ROUNDS):
        if i and time.perf_counter() > end:
            break
        for n in candidates:
            times[n].append(run(n))
    medians = {n: median(found) for n, found in times.items()}
    best = min(medians.values())
    return next((n, medians[n]) for n in candidates if medians[n] <= NEAR * best)


# -- what is kept ------------------------------------------------------------------------------------


def _path() -> Path:
    return users_cache() / "threads.json"


def _read() -> dict[str, dict[str, Any]]:
    """Read the file; one that is missing or that another program has spoilt is empty."""
    try:
        entries = json.loads(_path().read_bytes())
    except (OSError, OutputError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: entry for key, entry in entries.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("at"), int | float)
        and all(type(entry.get(key)) is int and entry[key] > 0 for key in ("generate", "prompt"))
    )


def _keep(key: str, counts: ThreadCounts) -> None:
    """Add an entry; where the folder cannot be written, the next load measures again."""
    entry = {"generate": counts.generate, "prompt": counts.prompt, "at": int(time.time())}
    entries = {**_read(), key: entry}
    newest = sorted(entries, key=lambda name: entries[name]["at"])[-MAX_KEPT:]
    with suppress(OSError, OutputError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: entries[name] for name in newest}, indent=1)
        write_file(_path(), f"{text}\n".encode())
