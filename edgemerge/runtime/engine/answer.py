"""One answer while it is computed: its tokens, its sampler, its text."""

from __future__ import annotations

from edgemerge.runtime.engine.drafts import Drafts
from edgemerge.runtime.engine.draw import Sampler
from edgemerge.runtime.engine.messages import Begun, Ended, Generation, Piece, TokenScore
from edgemerge.runtime.engine.slots import Slot
from edgemerge.runtime.engine.text import AnswerText
from edgemerge.runtime.llama import Model
from edgemerge.runtime.repetition import LoopWatch

__all__ = ["Answer"]


class Answer:
    """A prompt and what is drawn after it.

    Parameters
    ----------
    key : int
        Names it in the events.
    model : Model
        What answers.
    wanted : Generation
        What is wanted.
    prompt : list of int
        Its prompt as tokens.
    n_put : int
        Tokens that were put before the text of the prompt (the beginning of sequence); no scores of them.
    n_ctx : int
        Tokens that there is room for.
    sampler : Sampler, optional
        Draws this answer among others; by default there is one for it alone.

    Attributes
    ----------
    tokens : list of int
        The prompt, and what was drawn.
    slot : Slot or None
        The sequence that computes it; None while it waits.
    is_scored : bool
        Whether the scores of the prompt were given, or are not wanted.
    drafts : Drafts
        Guesses at what it goes on with.
    """

    def __init__(
        self,
        key: int,
        model: Model,
        wanted: Generation,
        prompt: list[int],
        n_put: int,
        n_ctx: int,
        sampler: Sampler | None = None,
    ) -> None:
        self.key = key
        self.wanted = wanted
        self.tokens = list(prompt)
        self.n_prompt = len(prompt)
        self.n_put = n_put
        self.slot: Slot | None = None
        self.is_scored = not wanted.scores_prompt
        self.n_alternatives = (wanted.n_alternatives or 0) if wanted.scores_prompt else -1
        self.drafts = Drafts()
        self._model = model
        self._limit = min(wanted.max_tokens, n_ctx - len(prompt))
        self._text = AnswerText(wanted.stops)
        self._loop = LoopWatch()
        self._n_pending = 0  # tokens whose text was not given yet
        self._pending: list[TokenScore] = []
        self._is_begun = False
        self._owns_sampler = sampler is None
        self.sampler = Sampler(model, wanted.sampling) if sampler is None else sampler
        if self.sampler.has_penalties:
            self.sampler.see(prompt)

    def close(self) -> None:
        """Free what it draws with."""
        if self._owns_sampler:
            self.sampler.close()

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text ended it."""
        return self._text.is_stopped

    @property
    def n_left(self) -> int:
        """Tokens that are still to be computed before the next can be drawn."""
        return len(self.tokens) - len(self.slot.tokens if self.slot else ())

    @property
    def n_wanted(self) -> int:
        """Tokens that may still be drawn."""
        return self._limit - (len(self.tokens) - self.n_prompt)

    @property
    def is_drawing(self) -> bool:
        """Whether its prompt is read."""
        return self.is_scored and self.n_left == 1 and len(self.tokens) > self.n_prompt

    @property
    def wants_scores(self) -> bool:
        """Whether the drawn tokens are scored."""
        return self.wanted.n_alternatives is not None

    def begin(self, n_reused: int) -> Begun | None:
        """Note that it is computed from now on; None the second time, after it had to wait again."""
        if self._is_begun:
            return None
        self._is_begun = True
        return Begun(self.n_prompt, n_reused)

    def note_prompt(self) -> Ended | None:
        """Note that the prompt is computed; the end, where nothing is to be drawn."""
        return self._end("length") if self._limit < 1 else None

    def push(self, token: int, score: TokenScore | None) -> list[Piece | Ended]:
        """Add a drawn token; give the text that can be said now, and the end.

        Parameters
        ----------
        token : int
            What was drawn; -1 where the grammar allows no other.
        score : TokenScore or None
            Its score, where scores are wanted.
        """
        if token < 0 or self._model.is_end(token):
            return [*self._flush(), self._end("stop", score)]
        self.tokens.append(token)
        self._n_pending += 1
        if score is not None:
            self._pending.append(score)
        text = self._text.push(self._model.piece(token))
        if self._text.is_stopped:
            return [*self._flush_until(text), self._end("stop")]
        said: list[Piece | Ended] = []
        if text:
            said.append(self._take(text))
        if len(self.tokens) - self.n_prompt == self._limit:
            return [*said, *self._flush(), self._end("length")]
        if self._loop.push(token):
            return [*said, *self._flush(), self._end("loop")]
        return said

    def _take(self, text: str) -> Piece:
        piece = Piece(text, self._n_pending, self._pending)
        self._n_pending, self._pending = 0, []
        return piece

    def _flush(self) -> list[Piece]:
        text = self._text.finish()
        return [self._take(text)] if text or self._pending else []

    def _flush_until(self, text: str) -> list[Piece]:
        """Give the text before a stop text, with the scores of the tokens that are in it as a whole."""
        size, end = len(text.encode()), 0
        n = 0
        for score in self._pending:
            end += len(score.piece)
            if end > size:
                break
            n += 1
        del self._pending[n:]
        return [self._take(text)] if text else []

    def _end(self, reason: str, score: TokenScore | None = None) -> Ended:
        return Ended(reason, len(self.tokens) - self.n_prompt, score)
