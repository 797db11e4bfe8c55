"""Embeds texts with the weights and the context that also generate, and orders texts by a question."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemerge.runtime.batch import DecodeError, PoolFull
from edgemerge.runtime.context import Context
from edgemerge.runtime.engine.messages import AllEmbedded, Embedded, Failed
from edgemerge.runtime.engine.slots import Slots
from edgemerge.runtime.engine.vectors import write_vector
from edgemerge.runtime.llama import Model

__all__ = ["Embedder", "EmbeddingJob"]

_CLS, _LAST = "2", "3"  # enum llama_pooling_type of llama.h, as text of metadata

Vector = NDArray[np.float64]


@dataclass(eq=False, slots=True)
class EmbeddingJob:
    """Texts of one request.

    Attributes
    ----------
    key : int
        Names it in the events.
    inputs : list of list of int
        Tokens of each text.
    ranks : bool
        Whether the model's judgement is wanted, one number a text, rather than a vector.
    n_found : int
        Texts whose vectors or numbers were told; they are computed in their order.
    """

    key: int
    inputs: list[list[int]]
    ranks: bool = False
    n_found: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.inputs))


@dataclass(eq=False, slots=True)
class _Text:
    """One text while it is computed: what its tokens have given up to now."""

    job: EmbeddingJob
    tokens: list[int]
    sequence: int = -1
    n_done: int = 0
    pooled: Vector | None = None
    gave_way: bool = False  # had to leave the cache, and is computed anew


class Embedder:
    """Computes embeddings, a batch at a time, between the batches of what is being drawn.

    Parameters
    ----------
    model, context : Model, Context
        What computes.
    slots : Slots
        Sequences that keep what can be forgotten, where the cache is full.
    sequences : range
        Sequences of the context that nothing else uses.
    n_rows : int
        Most tokens of one batch: all of them give numbers.
    whole : bool
        Whether a text has to be computed in one batch, as by an encoder.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        slots: Slots,
        sequences: range,
        *,
        n_rows: int,
        whole: bool,
    ) -> None:
        self._model = model
        self._api = model.api
        self._context = context
        self._slots = slots
        self._free = list(sequences)
        self._whole = whole
        self._batch = context.batch(n_rows)
        self._width = model.n_embd_out  # LFM2's is not n_embd
        self._pooling = model.pooling
        self._waiting: deque[_Text] = deque()
        self._active: list[_Text] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._active and not self._waiting

    @property
    def n_claimed(self) -> int:
        """Tokens of a text that gave way: it comes before answers that have not begun; 0 where none did."""
        text = next(iter((*self._active[:1], *islice(self._waiting, 1))), None)
        return len(text.tokens) if text is not None and text.gave_way else 0

    def add(self, job: EmbeddingJob) -> None:
        """Compute what a request wants."""
        self._waiting += (_Text(job, tokens) for tokens in job.inputs)

    def cancel(self, key: int) -> None:
        """Compute it no further."""
        self._waiting = deque(text for text in self._waiting if text.job.key != key)
        for text in [text for text in self._active if text.job.key == key]:
            self._leave(text)

    def give_way(self) -> bool:
        """Leave the cache to others; False where no text has anything there."""
        if not any(text.n_done for text in self._active):
            return False
        for text in self._active[::-1]:
            self._leave(text)
            gave_way = bool(text.n_done)
            self._waiting.appendleft(_Text(text.job, text.tokens, gave_way=gave_way))
        return True

    def step(self, *, others: bool, is_crowded: bool = False) -> list[tuple[int, Any]]:
        """Compute one batch; give what the texts that are complete gave.

        Parameters
        ----------
        others : bool
            Whether answers are being computed too, which will leave the cache some time.
        is_crowded : bool
            Whether they had no room: what gave way to them waits until one ends.
        """
        parts = self._fill(is_crowded=is_crowded)
        if not parts:
            return []
        self._api.llama_set_embeddings(self._context.handle, True)
        try:
            self._batch.run()
            if parts[0][0].job.ranks:
                self._take_ranks(parts)
            else:
                self._take_rows(parts)
        except PoolFull:
            if self._slots.evict() or others or (len(self._active) > 1 and self.give_way()):
                return []
            return self._fail("the context has no room for this input", 500)
        except DecodeError as error:
            return self._fail(str(error), 500)
        finally:
            self._api.llama_set_embeddings(self._context.handle, False)
        return self._finish(parts)

    def _fill(self, *, is_crowded: bool) -> list[tuple[_Text, int]]:
        """Fill the batch with texts in their order; give them, and how many tokens of each."""
        self._batch.clear()
        self._begin(is_crowded=is_crowded)
        parts = []
        for text in self._active:
            n = min(len(text.tokens) - text.n_done, self._batch.size - self._batch.n)
            if n < 1:
                break
            part = text.tokens[text.n_done : text.n_done + n]
            self._batch.add_all(part, text.n_done, text.sequence, output=True)
            parts.append((text, n))
        return parts

    def _begin(self, *, is_crowded: bool) -> None:
        """Give sequences to texts that wait, as many as the batch has room for, or to one that gave way."""
        room = self._batch.size - sum(len(text.tokens) - text.n_done for text in self._active)
        while self._waiting and self._free:
            text = self._waiting[0]
            if text.gave_way and is_crowded:
                break
            if self._active and (text.gave_way or self._active[0].gave_way):
                break  # together they may have no room
            if room < (len(text.tokens) if self._whole else 1):
                break
            room -= len(text.tokens)
            text.sequence = self._free.pop()
            self._active.append(self._waiting.popleft())

    def _take_rows(self, parts: Sequence[tuple[_Text, int]]) -> None:
        rows = self._batch.embeddings(self._width)
        start = 0
        for text, n in parts:
            self._pool(text, rows[start : start + n].astype(np.float64))
            start += n

    def _pool(self, text: _Text, rows: Vector) -> None:
        """Make one vector of the tokens': the first one's, the last one's, or their sum."""
        if self._pooling == _LAST:
            text.pooled = rows[-1]
        elif self._pooling != _CLS:
            text.pooled = rows.sum(axis=0) + (0.0 if text.pooled is None else text.pooled)
        elif text.pooled is None:
            text.pooled = rows[0]

    def _take_ranks(self, parts: Sequence[tuple[_Text, int]]) -> None:
        for text, _ in parts:
            found = self._api.llama_get_embeddings_seq(self._context.handle, text.sequence)
            text.pooled = np.array([found[0]], np.float64)

    def _finish(self, parts: Sequence[tuple[_Text, int]]) -> list[tuple[int, Any]]:
        """End the texts that are complete, and the requests whose last one they are."""
        events: list[tuple[int, Any]] = []
        for text, n in parts:
            if text not in self._active:  # another text of its request has failed
                continue
            text.n_done += n
            if text.n_done < len(text.tokens):
                continue
            self._leave(text)
            assert text.pooled is not None
            job = text.job
            length = 1.0 if job.ranks else float(np.linalg.norm(text.pooled))
            vector = text.pooled / length if length else text.pooled * np.nan
            if not np.isfinite(vector).all():
                self.cancel(job.key)
                events.append(
                    (job.key, Failed("the model's embedding of a text is no number", 500))
                )
                continue
            value = float(vector[0]) if job.ranks else write_vector(vector)
            events.append((job.key, Embedded(value)))
            job.n_found += 1
            if job.n_found == len(job.inputs):
                events.append((job.key, AllEmbedded(job.n_tokens)))
        return events

    def _leave(self, text: _Text) -> None:
        self._active.remove(text)
        memory = self._api.llama_get_memory(self._context.handle)
        if memory:  # an encoder has none
            self._api.llama_memory_seq_rm(memory, text.sequence, -1, -1)
        self._free.append(text.sequence)

    def _fail(self, reason: str, status: int) -> list[tuple[int, Any]]:
        """End all requests that are being computed."""
        keys = {text.job.key for text in self._active}
        for key in keys:
            self.cancel(key)
        return [(key, Failed(reason, status)) for key in keys]
