"""Continues a prompt, token by token.

A `Session` is an engine of one sequence, which keeps what it has computed: the next prompt is run from where
it first differs. llama.cpp computes on a thread of its own, so Ctrl-C is heard in the middle of a long
prompt. Its abort callback then ends the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.closing import Closing
from edgemerge.runtime.engine.answer import Answer
from edgemerge.runtime.engine.drafts import MOST
from edgemerge.runtime.engine.draw import Sampler
from edgemerge.runtime.engine.messages import Begun, Ended, Failed, Generation, Piece, Sampling
from edgemerge.runtime.engine.prompts import check_prompt, read_prompt
from edgemerge.runtime.engine.scheduler import Event, Scheduler
from edgemerge.runtime.engine.slots import Slots
from edgemerge.runtime.engine.store import Store
from edgemerge.runtime.llama import Context, Model
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
        Tokens that were drawn after the first, with the one that ends the text.
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


class Session(Closing):
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
        self._worker = Worker()  # all that computes runs there, one after the other
        self.context = self._worker.do(model.context, n_ctx, n_batch=_BATCH + 1, n_outputs=1 + MOST)
        # C keeps the pointer only. llama.cpp asks for each node of its graph, 500 times a token for
        # a small model, which no clock here can tell from not asking.
        self._abort = model.api.ggml_abort_callback(lambda _: self._worker.is_stopped)
        model.api.llama_set_abort_callback(self.context.handle, self._abort, None)
        self._slots = _one_slot(model, self.context)
        self._scheduler = Scheduler(
            model, self.context, self._slots, n_chunk=_BATCH, n_rows=1 + MOST
        )
        self._sampler = Sampler(model, sampling)

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
        if limit < 1:
            self.figures.end = end_at_limit
            return
        wanted = Generation(list(prompt), limit, self.sampling, tuple(stops))
        answer = Answer(0, self.model, wanted, list(prompt), 0, self.n_ctx, self._sampler)
        if progress is not None:
            n_known = min(self._slots.n_known(answer.tokens), len(prompt) - 1)
            progress(n_known, len(prompt))
        self._scheduler.add(answer)
        try:
            while True:
                for event in self._step(answer, progress):
                    if isinstance(event, Piece):
                        yield event.text
                    elif isinstance(event, Failed):
                        raise RuntimeFailure(f"{self.model.path}: {event.reason}")
                    elif isinstance(event, Ended):
                        self.figures.end = _why(answer, event, end_at_limit)
                        return
        finally:
            self._scheduler.cancel(answer.key)

    def _step(self, answer: Answer, progress: Callable[[int, int], None] | None) -> Sequence[Event]:
        """Compute a part of the prompt or a token, and count it."""
        figures = self.figures
        is_step, n_before = answer.is_drawing, figures.n_generated
        started = perf_counter()
        events = [event for _, event in self._worker.do(self._scheduler.step)]
        seconds = perf_counter() - started
        figures.n_generated = len(answer.tokens) - answer.n_prompt
        if is_step:
            # guesses give several at a time; what ends the text is none of it
            figures.n_steps += max(1, figures.n_generated - n_before)
            figures.step_seconds += seconds
            return events
        figures.prompt_seconds += seconds
        if events and isinstance(events[0], Begun):
            figures.n_reused = events[0].n_reused
        if progress is not None and answer.slot is not None:
            progress(min(len(answer.slot.tokens), answer.n_prompt), answer.n_prompt)
        if figures.n_generated or any(isinstance(event, Ended) for event in events):
            figures.first_token_seconds = figures.prompt_seconds
        return events


def _one_slot(model: Model, context: Context) -> Slots:
    store = Store(model.api, context.handle, 0)
    return Slots(model.api, context.handle, 1, 0, store, keeps_state=model.keeps_state)


def _why(answer: Answer, ended: Ended, end_at_limit: End) -> End:
    if ended.reason == "length":
        return end_at_limit
    if ended.reason == "loop":
        return End.LOOP
    return End.STOP if answer.is_stopped else End.MODEL
