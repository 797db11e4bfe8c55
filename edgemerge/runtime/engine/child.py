"""The process of a model: one thread computes, another reads what is asked.

What is asked may be a chat, whose template takes as long as a stranger likes, or a long text to cut into
tokens. So the thread that reads does this too, and what is being drawn goes on meanwhile.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Any

from edgemerge.errors import EdgemergeError, RuntimeFailure
from edgemerge.runtime.engine.answer import Answer
from edgemerge.runtime.engine.draw import BadGrammar
from edgemerge.runtime.engine.embedding import Embedder, EmbeddingJob
from edgemerge.runtime.engine.messages import AllEmbedded, Ended, Failed, Generation, Piece
from edgemerge.runtime.engine.options import EngineOptions
from edgemerge.runtime.engine.prompts import (
    Refused,
    check_vectors,
    read_generation,
    read_pair,
    read_whole_text,
    write_text,
)
from edgemerge.runtime.engine.scheduler import Scheduler
from edgemerge.runtime.engine.setup import Loaded, load
from edgemerge.runtime.engine.wire import Unpacker, pack

__all__ = ["main"]

_HOLD = 0.05  # seconds that text may wait for more: each message takes a core from what computes
_SWITCH = 0.0005  # seconds: the thread that computes must not wait long for the other one's Python
_READ = 1 << 16  # bytes


class _Pipe:
    """The way to the server; both threads write."""

    def __init__(self, file: int) -> None:
        self._socket = socket.socket(fileno=file)
        self._lock = Lock()
        self._unpacker = Unpacker()
        self._held: dict[int, Piece] = {}
        self._begun: set[int] = set()  # answers whose first text was sent
        self._said = 0.0  # when pieces were sent last

    def say(self, events: list[tuple[int, Any]]) -> None:
        """Send what there is for requests, by their keys; 0 stands for the model itself."""
        message = pack([(key, _shorten(event)) for key, event in events])
        with self._lock:
            self._socket.sendall(message)

    def say_soon(self, events: list[tuple[int, Any]]) -> None:
        """Send what was computed; text after the first waits for more of it, where that comes quickly."""
        if all(self._can_wait(key, event) for key, event in events):
            for key, event in events:
                held = self._held.get(key)
                self._held[key] = event if held is None else _join(held, event)
            if monotonic() - self._said >= _HOLD:
                self.flush()
        else:
            self.flush(events)
            self._begun.update(key for key, event in events if type(event) is Piece)
            self._begun.difference_update(key for key, event in events if _is_end(event))

    def forget(self, key: int) -> None:
        """Send no more of a cancelled answer."""
        self._held.pop(key, None)
        self._begun.discard(key)

    def _can_wait(self, key: int, event: Any) -> bool:
        return type(event) is Piece and not event.scores and key in self._begun

    def flush(self, events: Sequence[tuple[int, Any]] = ()) -> None:
        """Send the text that waits, and these events."""
        held, self._held = self._held, {}
        self._said = monotonic()
        if held or events:
            with suppress(BrokenPipeError):  # the other thread notices
                self.say([*held.items(), *events])

    def listen(self, hear: Callable[..., None]) -> None:
        """Call with each message until the server is gone."""
        while data := self._socket.recv(_READ):
            for message in self._unpacker.push(data):
                hear(*message)


def _is_end(event: Any) -> bool:
    return isinstance(event, Ended | Failed)


def _join(first: Piece, second: Piece) -> Piece:
    return Piece(first.text + second.text, first.n_tokens + second.n_tokens)


def _shorten(event: Any) -> Any:
    """Send a piece without scores, which most messages are made of, as a plain pair."""
    if type(event) is Piece and not event.scores:
        return event.text, event.n_tokens
    return event


class _Reader:
    """Makes what is asked ready for the thread that computes.

    Parameters
    ----------
    pipe : _Pipe
        Where answers go that need no computing.

    Attributes
    ----------
    ready : SimpleQueue
        What the other thread has to do: functions of the scheduler.
    """

    def __init__(self, pipe: _Pipe) -> None:
        self.ready: SimpleQueue[Any] = SimpleQueue()
        self._pipe = pipe
        self._loaded: Loaded | None = None

    def hear(self, job: str, key: int, *asked: Any) -> None:
        """Do a job, or hand it on."""
        if job in ("load", "cancel"):
            self.ready.put((job, key, *asked))
            return
        try:
            getattr(self, f"_{job}")(key, *asked)
        except Refused as error:
            self._pipe.say([(key, Failed(str(error), error.status))])
        except (EdgemergeError, BadGrammar) as error:
            self._pipe.say([(key, Failed(str(error), 400))])
        except UnicodeEncodeError:
            self._pipe.say([(key, Failed("the text has half of a surrogate pair", 400))])
        except MemoryError:
            self._pipe.say([(key, Failed("there is no memory for this request", 503))])
        except Exception as error:  # a fault of ours, which this request must not wait for
            name = type(error).__name__
            self._pipe.say(
                [(key, Failed(f"the model's process failed on this request ({name})", 500))]
            )

    def begin(self, loaded: Loaded) -> None:
        """Take the model, once it is loaded; nothing else is asked before."""
        self._loaded = loaded

    @property
    def _ready_model(self) -> Loaded:
        assert self._loaded is not None
        return self._loaded

    def _generate(self, key: int, wanted: Generation) -> None:
        loaded = self._ready_model
        if loaded.whole:
            raise Refused("this model embeds or orders texts and does not continue them")
        n_ctx = loaded.facts.n_ctx
        tokens, n_put = read_generation(loaded.model, loaded.template, wanted, n_ctx)
        self.ready.put(("answer", key, Answer(key, loaded.model, wanted, tokens, n_put, n_ctx)))

    def _tokenize(self, key: int, text: str, add_special: bool) -> None:
        model = self._ready_model.model
        self._pipe.say([(key, model.tokenize(text, special=True, add_special=add_special))])

    def _detokenize(self, key: int, tokens: list[int]) -> None:
        self._pipe.say([(key, write_text(self._ready_model.model, tokens))])

    def _embed(self, key: int, inputs: list[str | list[int]]) -> None:
        loaded = self._ready_model
        if loaded.facts.can_rerank:
            raise Refused("this model orders texts and does not embed them")
        check_vectors(len(inputs), loaded.model.n_embd_out)
        n_ctx = loaded.facts.n_ctx
        read = [read_whole_text(loaded.model, one, n_ctx) for one in inputs]
        self._hand_on(EmbeddingJob(key, read))

    def _rerank(self, key: int, query: str, texts: list[str]) -> None:
        loaded = self._ready_model
        if not loaded.facts.can_rerank:
            raise Refused("this model does not order texts")
        read = [read_pair(loaded.model, query, text, loaded.facts.n_ctx) for text in texts]
        self._hand_on(EmbeddingJob(key, read, ranks=True))

    def _hand_on(self, job: EmbeddingJob) -> None:
        if job.inputs:
            self.ready.put(("embed", job.key, job))
        else:
            self._pipe.say([(job.key, AllEmbedded(0))])


def main() -> None:
    """Serve a model to the process at the other end of a socket, whose number is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is ours
    sys.setswitchinterval(_SWITCH)
    pipe = _Pipe(int(sys.argv[1]))
    reader = _Reader(pipe)

    def listen() -> None:
        try:
            pipe.listen(reader.hear)
        except OSError:  # it was gone before it had read all
            pass
        finally:
            os._exit(0)  # the server is gone: nobody waits for what is being computed

    Thread(target=listen, daemon=True).start()
    _, _, options = reader.ready.get()
    try:
        loaded = load(options)
    except EdgemergeError as error:
        pipe.say([(0, error)])
        return
    except MemoryError:
        pipe.say([(0, RuntimeFailure(f"{options.path}: there is no memory for this model"))])
        return
    reader.begin(loaded)
    pipe.say([(0, loaded.facts)])
    _compute(loaded, options, reader.ready, pipe)


def _compute(loaded: Loaded, options: EngineOptions, ready: SimpleQueue[Any], pipe: _Pipe) -> None:
    """Compute what is ready, batch after batch, for ever."""
    embedder = Embedder(
        loaded.model,
        loaded.context,
        loaded.slots,
        loaded.spare_sequences,
        n_rows=loaded.n_rows,
        whole=loaded.whole,
    )
    scheduler = Scheduler(
        loaded.model,
        loaded.context,
        loaded.slots,
        n_chunk=options.n_chunk,
        n_rows=loaded.n_rows,
        embedder=embedder,
    )

    def cancel(key: int) -> None:
        scheduler.cancel(key)
        embedder.cancel(key)
        pipe.forget(key)

    jobs = {"answer": scheduler.add, "embed": embedder.add, "cancel": cancel}
    while True:
        is_idle = scheduler.is_idle and embedder.is_idle
        with suppress(Empty):
            while True:
                job, key, *asked = ready.get(block=is_idle)
                jobs[job](*asked or (key,))  # type: ignore[operator]
                is_idle = False
                pipe.flush()  # a batch of a new prompt may take long
        events: list[tuple[int, Any]] = [*scheduler.step()]
        events += embedder.step(others=scheduler.is_computing, is_crowded=scheduler.is_crowded)
        pipe.say_soon(events)
        scheduler.tidy()


if __name__ == "__main__":
    main()
