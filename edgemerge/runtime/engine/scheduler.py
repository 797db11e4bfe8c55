"""Computes many answers together: each step is one batch for llama.cpp.

A batch has the last token of all answers that are being drawn, and tokens of short prompts; the next one has
a chunk of a long prompt. So a long prompt has the others wait for one chunk at a time.

Both in one batch would gain next to nothing. And from 64 tokens on, ggml adds the numbers of attention up in
another way: what is drawn would depend on who asks something else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from time import perf_counter

from edgemerge.runtime.batch import Aborted, DecodeError, PoolFull
from edgemerge.runtime.context import Context
from edgemerge.runtime.engine.answer import Answer
from edgemerge.runtime.engine.drafts import MOST
from edgemerge.runtime.engine.embedding import Embedder
from edgemerge.runtime.engine.messages import Begun, Ended, Failed, Piece, PromptScored, TokenScore
from edgemerge.runtime.engine.scores import score_token
from edgemerge.runtime.engine.slots import Slots
from edgemerge.runtime.engine.store import common_length
from edgemerge.runtime.llama import Model

__all__ = ["Event", "Scheduler"]

Event = Begun | PromptScored | Piece | Ended | Failed
Events = list[tuple[int, Event]]

_STALL = 0.25  # seconds that the prompts in one batch may take while others are being drawn
_LEAST_CHUNK = 16  # tokens of short prompts in a batch, however many answers are being drawn
_TILE = 64  # tokens of a batch from which on attention adds up otherwise (ggml_fa_tile_config of ggml-cpu)
_WORTH_WAITING = (
    32  # tokens: so many more in common with a prompt being read, and a new one waits for it
)


class Scheduler:
    """Answers of one model in one context.

    Parameters
    ----------
    model : Model
        A loaded model.
    context : Context
        An empty context.
    slots : Slots
        Its sequences.
    n_chunk : int
        Most tokens of prompts in one batch.
    n_rows : int
        Most logits of one batch.
    embedder : Embedder, optional
        What else computes in the context.

    Attributes
    ----------
    is_crowded : bool
        Whether something had to leave the cache: no other answer begins before one ends.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        slots: Slots,
        *,
        n_chunk: int,
        n_rows: int,
        embedder: Embedder | None = None,
    ) -> None:
        self._model = model
        self._context = context
        self._slots = slots
        self._n_chunk = n_chunk
        self._n_rows = n_rows
        self._embedder = embedder
        self._batch = context.batch(max(n_chunk, MOST) + slots.n_active)
        self._waiting: deque[Answer] = deque()
        self._active: list[Answer] = []  # in the order in which they began
        self.is_crowded = False
        self._prompt_seconds = 0.0  # that a token of a prompt takes; 0 until it is known
        self._has_left = False  # an answer, since `tidy`
        self._was_long = False  # whether the last batch was of a long prompt
        self._guessed: list[int] = []  # tokens of the batch that the only answer may go on with

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.n_all

    @property
    def n_all(self) -> int:
        """Answers that are computed or wait."""
        return len(self._active) + len(self._waiting)

    @property
    def is_computing(self) -> bool:
        """Whether answers are in the cache."""
        return bool(self._active)

    def add(self, answer: Answer) -> None:
        """Compute an answer as soon as a sequence is free."""
        self._waiting.append(answer)

    def cancel(self, key: int) -> None:
        """Compute an answer no further; its sequence is free at once."""
        for answer in self._waiting:
            if answer.key == key:
                self._waiting.remove(answer)
                answer.close()
                return
        for answer in self._active:
            if answer.key == key:
                self._release(answer)
                return

    def step(self) -> Events:
        """Compute one batch, and give what came of it."""
        events: Events = [(answer.key, begun) for answer, begun in self._admit()]
        outputs = self._fill()
        if not outputs:
            return events
        started = perf_counter()
        try:
            self._batch.run()
        except Aborted:
            for answer, *_ in outputs:
                assert answer.slot is not None
                self._slots.cut(answer.slot, len(answer.slot.tokens))
            return events
        except PoolFull:
            return events + self._make_room()
        except DecodeError as error:
            return events + self._fail(str(error))
        for answer, place, n, wanted in outputs:
            assert answer.slot is not None
            position = len(answer.slot.tokens)
            answer.slot.tokens += answer.tokens[position : position + n]
            if wanted:
                found = self._look(answer, place, n)
                if self._guessed:
                    found += self._check_guesses(answer, place, ended=_has_ended(found))
                if _has_ended(found):
                    self._release(answer)
                events += [(answer.key, event) for event in found]
        self._note_time(perf_counter() - started, outputs)
        return events

    def tidy(self) -> None:
        """Copy out of the cache what ended answers leave there; after `step`, when its events were sent."""
        if self._has_left:
            self._has_left = False
            self._slots.tidy(is_idle=self.is_idle)

    # -- what begins

    def _admit(self) -> Iterator[tuple[Answer, Begun]]:
        """Begin answers that wait, in their order, while a batch has room for more of a prompt."""
        while self._waiting and self._has_room_for(self._waiting[0]):
            answer = self._waiting[0]
            slot = self._slots.take(answer.tokens, len(answer.tokens) - 1, answer.n_alternatives)
            if slot is None:
                return
            self._waiting.popleft()
            answer.slot = slot
            self._active.append(answer)
            begun = answer.begin(len(slot.tokens))
            if begun is not None:
                yield answer, begun

    def _has_room_for(self, answer: Answer) -> bool:
        n_claimed = self._embedder.n_claimed if self._embedder is not None else 0
        if not self._active and not n_claimed:
            return True
        reading = [one for one in self._active if not one.is_drawing]
        if self.is_crowded or sum(one.n_left for one in reading) >= self._n_chunk:
            return False
        n_known = self._slots.n_known(answer.tokens, answer.n_alternatives)
        used = sum(len(one.tokens) - one.slot.n_copied for one in self._active if one.slot)
        if used + n_claimed + len(answer.tokens) - n_known >= self._context.n_ctx:
            return False
        n_coming = max((common_length(one.tokens, answer.tokens) for one in reading), default=0)
        return n_coming < n_known + _WORTH_WAITING

    # -- what is computed

    def _fill(self) -> list[tuple[Answer, int, int, bool]]:
        """Fill the batch; give each answer in it, its place, its tokens, and whether logits come of it."""
        self._batch.clear()
        self._guessed = []
        long = [one for one in self._active if one.is_scored and one.n_left >= _TILE]
        others = [one for one in self._active if one not in long]
        self._was_long = bool(long) and not (self._was_long and others)
        if self._was_long:
            n = min(long[0].n_left, self._budget(others=bool(others)))
            return [(long[0], *self._add_prompt(long[0], n))]
        outputs = []
        for answer in (one for one in others if one.is_drawing):
            assert answer.slot is not None
            slot = answer.slot
            place = self._batch.add(answer.tokens[-1], len(slot.tokens), slot.id)
            outputs.append((answer, place, 1, True))
            if self.n_all == 1 and (guessed := self._guess(answer)):
                self._guessed = guessed
                self._batch.add_all(guessed, len(slot.tokens) + 1, slot.id, output=True)
        most = min(max(_TILE - 1, len(outputs) + _LEAST_CHUNK), self._batch.size)
        rows = self._n_rows - len(outputs)
        for answer in (one for one in others if not one.is_drawing):
            n = min(answer.n_left, self._n_chunk, most - self._batch.n)
            if not answer.is_scored:
                n = min(n, rows)
            if n < 1 or rows < 1:
                break
            outputs.append((answer, *self._add_prompt(answer, n)))
            rows -= 1 if answer.is_scored else n
        return outputs

    def _guess(self, answer: Answer) -> list[int]:
        """Guess what an answer goes on with; what turns out wrong has to be taken out of the cache again."""
        room = self._context.n_ctx - len(answer.tokens)
        if self._model.keeps_state or room <= MOST:
            return []
        most = min(MOST, answer.n_wanted - 1, self._n_rows - 1)
        return answer.drafts.guess(answer.tokens, most)

    def _check_guesses(self, answer: Answer, place: int, *, ended: bool) -> list[Event]:
        """Go on with an answer as long as what is drawn was guessed; forget the rest."""
        slot = answer.slot
        assert slot is not None
        events: list[Event] = []
        n_right = 0
        for guess in self._guessed:
            if ended or answer.tokens[-1] != guess:
                break
            n_right += 1
            slot.tokens.append(guess)
            events += self._look(answer, place + n_right, 1)
            ended = _has_ended(events)
        answer.drafts.note(len(self._guessed), n_right, len(answer.tokens))
        if n_right < len(self._guessed):
            self._slots.cut(slot, len(slot.tokens))
        return events

    def _add_prompt(self, answer: Answer, n: int) -> tuple[int, int, bool]:
        """Add the next n tokens of a prompt; give their place, n, and whether logits come of them."""
        slot = answer.slot
        assert slot is not None
        position = len(slot.tokens)
        part = answer.tokens[position : position + n]
        place = self._batch.add_all(part, position, slot.id, output=not answer.is_scored)
        is_last = position + n == len(answer.tokens)
        if is_last:
            self._batch.want(place + n - 1)
        return place, n, is_last or not answer.is_scored

    def _budget(self, *, others: bool) -> int:
        """Tokens of a long prompt for one batch: few enough that others do not wait long."""
        if not others or not self._prompt_seconds:
            return self._n_chunk
        n = int(_STALL / self._prompt_seconds)
        return min(max(_TILE, n), self._n_chunk)

    def _note_time(self, seconds: float, outputs: list[tuple[Answer, int, int, bool]]) -> None:
        n = sum(n for _, _, n, _ in outputs)
        if n >= _TILE:
            self._prompt_seconds = seconds / n

    def _look(self, answer: Answer, place: int, n: int) -> list[Event]:
        """Score and draw by the logits of an answer's tokens in the batch."""
        events: list[Event] = []
        if not answer.is_scored and (scored := self._score_prompt(answer, place, n)) is not None:
            events.append(scored)
        if answer.n_left:
            return events
        if len(answer.tokens) == answer.n_prompt and (end := answer.note_prompt()) is not None:
            return [*events, end]
        token = answer.sampler.sample(self._context.handle, place + n - 1)
        score = None
        if answer.wants_scores and token >= 0:
            logits = self._batch.logits(place + n - 1)
            n_alternatives = answer.wanted.n_alternatives or 0
            score = score_token(logits, token, n_alternatives, self._model.piece)
        return [*events, *answer.push(token, score)]

    def _score_prompt(self, answer: Answer, place: int, n: int) -> PromptScored | None:
        slot = answer.slot
        assert slot is not None
        scores, piece = slot.scores, self._model.piece
        if not scores:
            scores.append(TokenScore(answer.tokens[0], piece(answer.tokens[0]), None))
        first = len(slot.tokens) - n + 1  # the token that the first of these logits is about
        for i, token in enumerate(answer.tokens[first : first + n]):
            logits = self._batch.logits(place + i)
            scores.append(score_token(logits, token, answer.n_alternatives, piece))
        if answer.n_left:
            return None
        answer.is_scored = True
        return PromptScored(scores[answer.n_put :])

    # -- what ends

    def _release(self, answer: Answer) -> None:
        assert answer.slot is not None
        self._active.remove(answer)
        self._slots.leave(answer.slot)
        self._has_left = True
        answer.close()
        self.is_crowded = False

    def _make_room(self) -> Events:
        """Forget what was kept, else have texts, or the answer that began last, wait again."""
        if self._slots.evict():
            return []
        if self._embedder is not None and self._embedder.give_way():
            self.is_crowded = True
            return []
        if len(self._active) == 1:
            return self._fail("the context has no room for this request")
        newest = self._active.pop()
        assert newest.slot is not None
        self._slots.forget(newest.slot)
        self._slots.leave(newest.slot)
        newest.slot = None
        self._waiting.appendleft(newest)
        self.is_crowded = True
        return []

    def _fail(self, reason: str) -> Events:
        """End all that is being computed, after llama.cpp has failed; the next batch begins anew."""
        failed = list(self._active)
        for answer in failed:
            self._release(answer)
        self._slots.clear()
        return [(answer.key, Failed(reason, 500)) for answer in failed]


def _has_ended(events: list[Event]) -> bool:
    return bool(events) and isinstance(events[-1], Ended)
