"""Continues a prompt, token by token.

A `Session` keeps what it has computed: the next prompt is run from where it first differs. llama.cpp computes
on a thread of its own, so Ctrl-C is heard in the middle of a long prompt. Its abort callback then ends the
computation.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from time import perf_counter
from types import TracebackType
from typing import Self

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.llama import Model
from edgemerge.runtime.repetition import LoopWatch
from edgemerge.runtime.sampling import Sampler, Sampling
from edgemerge.runtime.worker import Worker

__all__ = ["End", "Figures", "Session", "check_prompt", "read_prompt"]

_BATCH = 512  # prompt tokens per call


class End(StrEnum):
    """Why a text ended."""

    MODEL = "model"  # it said that it is done
    STOP = "stop"  # a stop text came
    LENGTH = "length"  # as many tokens as were asked for
    CONTEXT = "context"  # the context is full
    LOOP = "loop"  # the answer repeated itself
    BROKEN_OFF = "broken off"  # the caller went away, by Ctrl-C as a rule


@dataclass(slots=True)
class Figures:
    """What one text cost.

    Attributes
    ----------
    n_prompt, n_reused : int
        Tokens of the prompt, and how many of them were computed before.
    n_generated : int
        Tokens that were drawn, without the one that ends the text.
    n_steps : int
        Tokens that were run one by one; the first drawn token needs none.
    prompt_seconds, step_seconds : float
        Time for the prompt, and for all steps with their draws.
    first_token_seconds : float or None
        From the start until the first token was drawn.
    end : End
        Why it ended.
    """

    n_prompt: int = 0
    n_reused: int = 0
    n_generated: int = 0
    n_steps: int = 0
    prompt_seconds: float = 0.0
    step_seconds: float = 0.0
    first_token_seconds: float | None = None
    end: End = End.BROKEN_OFF

    @property
    def prompt_rate(self) -> float | None:
        """Tokens of the prompt per second, of those that were run; None where none was finished."""
        n_run = self.n_prompt - self.n_reused
        return n_run / self.prompt_seconds if self.prompt_seconds else None

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first; None where there was only one."""
        return self.n_steps / self.step_seconds if self.step_seconds else None


def read_prompt(model: Model, text: str) -> list[int]:
    """Tokens of a prompt, control tokens (`<|im_start|>`) understood, begun as the model wants it.

    A beginning of sequence that the text already has, as of a chat template, is not doubled.
    """
    tokens = model.tokenize(text, special=True)
    return tokens if model.bos and tokens[:1] == model.bos else model.bos + tokens


def check_prompt(tokens: Sequence[int], n_ctx: int) -> None:
    """Refuse a prompt that nothing can follow.

    Raises
    ------
    RuntimeFailure
        It is empty, or fills the context.
    """
    if not tokens:
        raise RuntimeFailure("the prompt is empty: give the model at least one word to go on from")
    if len(tokens) >= n_ctx:
        raise RuntimeFailure(
            f"the prompt has {len(tokens)} tokens and the context is {n_ctx}: shorten the prompt"
        )


class Session:
    """One sequence of tokens and what was computed of it; use it in a `with` statement.

    Parameters
    ----------
    model : Model
        A loaded model.
    n_ctx : int
        Most tokens, prompt and answer together.
    sampling : Sampling
        How tokens are drawn.

    Raises
    ------
    RuntimeFailure
        llama.cpp cannot make such a context.
    """

    def __init__(self, model: Model, n_ctx: int, sampling: Sampling) -> None:
        self.model = model
        self.sampling = sampling
        self.n_ctx = n_ctx  # llama.cpp may round its own up
        self.figures = Figures()
        self._tokens: list[int] = []  # that the context holds
        self._worker = Worker()  # all that changes the context runs there, one after the other
        self.context = self._worker.do(model.context, n_ctx, n_batch=_BATCH)
        # C keeps the pointer only. llama.cpp asks for each node of its graph, 500 times a token for
        # a small model, which no clock here can tell from not asking.
        self._abort = model.api.ggml_abort_callback(lambda _: self._worker.is_stopped)
        model.api.llama_set_abort_callback(self.context.handle, self._abort, None)
        self._sampler = Sampler(model, sampling)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context, when nothing computes in it any more."""
        self._worker.close()
        self._sampler.close()
        self.context.close()

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int | None = None,
        *,
        stops: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[str]:
        """Continue a prompt and yield the text as it comes; `figures` are those of this text.

        What the context holds of the prompt already is not computed again.

        Parameters
        ----------
        prompt : sequence of int
            Token ids.
        max_tokens : int, optional
            Most tokens to draw; by default as many as the context has room for.
        stops : sequence of str
            Texts that end the generation; they are not yielded.
        progress : callable, optional
            Called with the number of prompt tokens that are computed, and of all.

        Raises
        ------
        RuntimeFailure
            The prompt is empty or fills the context, or llama.cpp fails.
        """
        check_prompt(prompt, self.n_ctx)
        self.figures = Figures(n_prompt=len(prompt))
        room = self.n_ctx - len(prompt)
        if max_tokens is not None and max_tokens <= room:
            return self._stream(prompt, max_tokens, End.LENGTH, stops, progress)
        return self._stream(prompt, room, End.CONTEXT, stops, progress)

    def _stream(
        self,
        prompt: Sequence[int],
        limit: int,
        end_at_limit: End,
        stops: Sequence[str],
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[str]:
        figures = self.figures
        if limit < 1:
            figures.end = end_at_limit
            return
        started = perf_counter()
        figures.n_reused = self._reuse(prompt)
        self._read(prompt, progress)
        figures.prompt_seconds = perf_counter() - started
        token = self._sampler.sample(self.context)
        figures.first_token_seconds = perf_counter() - started
        text, loop = _Text(stops), LoopWatch()
        while not self.model.is_end(token):
            figures.n_generated += 1
            if piece := text.push(self.model.piece(token)):
                yield piece
            if text.is_stopped:
                figures.end = End.STOP
                return
            if figures.n_generated == limit:
                figures.end = end_at_limit
                break
            if loop.push(token):
                figures.end = End.LOOP
                break
            started = perf_counter()
            self._run([token])
            token = self._sampler.sample(self.context)
            figures.n_steps += 1
            figures.step_seconds += perf_counter() - started
        else:
            figures.end = End.MODEL
        if piece := text.finish():
            yield piece

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Forget what the context has after its common beginning with a prompt."""
        pairs = zip(self._tokens, prompt, strict=False)
        n_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        n_common = min(n_common, len(prompt) - 1)  # the last is run in any case, for its logits
        if not self._worker.do(self._cut_back, n_common):
            n_common = 0
        del self._tokens[n_common:]
        return n_common

    def _cut_back(self, position: int) -> bool:
        """Forget what the context holds from a position on; False where all had to be forgotten."""
        try:
            self.context.truncate(position)
        except RuntimeFailure:  # a running state, as of Mamba, has no end that can be cut off
            self.context.clear()
            return False
        return True

    def _read(self, prompt: Sequence[int], progress: Callable[[int, int], None] | None) -> None:
        """Run what is left of a prompt, with logits for its last token."""
        self._sampler.see(prompt[len(self._tokens) :])
        for start in range(len(self._tokens), len(prompt), _BATCH):
            if progress is not None:
                progress(start, len(prompt))
            self._run(prompt[start : start + _BATCH])
        if progress is not None:
            progress(len(prompt), len(prompt))

    def _run(self, tokens: Sequence[int]) -> None:
        """Run tokens after those that the context holds, with logits for the last of them."""
        first = len(self._tokens)
        positions = range(first, first + len(tokens))
        wanted = [False] * (len(tokens) - 1) + [True]
        self._worker.do(self.context.decode, tokens, positions, [(0,)] * len(tokens), wanted)
        self._tokens += tokens


class _Text:
    """Text from the bytes of tokens: whole characters, and nothing that may become a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.is_stopped = False
        self._stops = [stop for stop in stops if stop]
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._kept = ""

    def push(self, raw: bytes) -> str:
        """Add a token's bytes; give what can be said now."""
        text = self._kept + self._characters.decode(raw)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        self.is_stopped = bool(found)
        n_said = min(found) if found else len(text) - self._n_unsure(text)
        self._kept = text[n_said:]
        return text[:n_said]

    def finish(self) -> str:
        """Give what was kept back; a character that was cut off becomes U+FFFD."""
        return self._kept + self._characters.decode(b"", final=True)

    def _n_unsure(self, text: str) -> int:
        """Length of the longest end of a text that begins a stop text."""
        lengths = range(max(map(len, self._stops), default=1) - 1, 0, -1)
        ends = (n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops))
        return next((n for n in ends if n <= len(text)), 0)
