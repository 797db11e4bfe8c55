"""Sequences of a context: which tokens each of them has, and what a new prompt can take over from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from edgemerge.runtime.engine.messages import TokenScore
from edgemerge.runtime.engine.store import Kept, Store, common_length

__all__ = ["Slot", "Slots"]

_LEAST_COPY = 4  # tokens: fewer are computed again, rather than kept from being forgotten
_LEAST_STORED = 32  # tokens: fewer are computed again, rather than copied out
_COPIED_IN_TIME = 128  # tokens that are copied in less time than one is computed


@dataclass(eq=False, slots=True)
class Slot:
    """A sequence.

    Attributes
    ----------
    id : int
        llama.cpp's number.
    tokens : list of int
        What the cache has of it.
    is_free : bool
        Whether no answer uses it; its tokens are kept for those that begin alike.
    n_copied : int
        Tokens at its beginning that take no room of its own: another one in use has them too.
    used : int
        The higher, the later it was used.
    scores : list of TokenScore
        Of its first tokens, as far as they were scored.
    n_alternatives : int
        That these scores name.
    """

    id: int
    tokens: list[int] = field(default_factory=list)
    is_free: bool = True
    n_copied: int = 0
    used: int = 0
    scores: list[TokenScore] = field(default_factory=list)
    n_alternatives: int = -1


class Slots:
    """All sequences of a context.

    Parameters
    ----------
    api : module
        llama_cpp.
    context : pointer
        llama.cpp's context, empty.
    n_active : int
        Answers at a time.
    n_kept : int
        Sequences beside those, which only keep what may be wanted again.
    store : Store
        Where sequences go that are not in use.
    keeps_state : bool
        Whether the model has a running state. It can neither be cut back nor be given to a second sequence.
    """

    def __init__(
        self,
        api: Any,
        context: Any,
        n_active: int,
        n_kept: int,
        store: Store,
        *,
        keeps_state: bool,
    ) -> None:
        self.n_active = n_active
        self._api = api
        self._memory = api.llama_get_memory(context)
        self.store = store
        self._keeps_state = keeps_state
        self._slots = [Slot(i) for i in range(n_active + n_kept)]
        self._ticks = count(1)

    def __iter__(self) -> Iterator[Slot]:
        """All of them."""
        return iter(self._slots)

    @property
    def n_all(self) -> int:
        """Sequences that there are."""
        return len(self._slots)

    @property
    def n_busy(self) -> int:
        """Sequences that answers use."""
        return sum(not slot.is_free for slot in self._slots)

    def take(self, prompt: Sequence[int], most: int, n_alternatives: int = -1) -> Slot | None:
        """Take a sequence for a prompt, with as much of it as some sequence has already.

        Parameters
        ----------
        prompt : sequence of int
            Tokens.
        most : int
            So many of them at most are taken over.
        n_alternatives : int
            Only tokens that were scored with so many alternatives are taken over; -1 for all tokens.

        Returns
        -------
        Slot or None
            What it has is a beginning of the prompt; None where all sequences are in use.
        """
        if self.n_busy >= self.n_active:
            return None
        self._bring_back(prompt, n_alternatives)
        source, n = self._longest(prompt, n_alternatives)
        n = min(n, most)
        slot = self._choose(source, n)
        scores = source.scores[: n + 1] if source is not None and n else []
        slot.n_copied = 0
        if source is not slot:
            self._put_away(slot)
            if source is not None and n:
                slot.n_copied = 0 if source.is_free else n
                self._api.llama_memory_seq_cp(self._memory, source.id, slot.id, 0, n)
                slot.tokens = source.tokens[:n]
        elif len(slot.tokens) > n:
            self.cut(slot, n)
        slot.scores = scores if n_alternatives >= 0 and slot.tokens else []
        slot.n_alternatives = n_alternatives
        slot.is_free = False
        slot.used = next(self._ticks)
        self.tidy(is_idle=False)
        return slot

    def n_known(self, prompt: Sequence[int], n_alternatives: int = -1) -> int:
        """How many tokens of a prompt need not be computed."""
        stored = (self._in_common(kept, prompt, n_alternatives) for kept in self.store)
        return max(self._longest(prompt, n_alternatives)[1], max(stored, default=0))

    def _longest(self, prompt: Sequence[int], n_alternatives: int) -> tuple[Slot | None, int]:
        """Find the sequence that begins most like a prompt, and how many tokens these are."""
        best, most = None, 0
        for slot in self._slots:
            n = self._in_common(slot, prompt, n_alternatives)
            if self._keeps_state and not slot.is_free:
                n = 0
            if n > most or (best is not None and n == most and best.is_free):
                best, most = slot, n  # rather one in use: what two have in common takes room once
        return best, most

    def _in_common(self, known: Slot | Kept, prompt: Sequence[int], n_alternatives: int) -> int:
        """How many tokens a prompt can take over from a sequence."""
        n = common_length(known.tokens, prompt)
        if n_alternatives >= 0:  # the last is computed again: its logits score the next
            n_scored = len(known.scores) if known.n_alternatives == n_alternatives else 0
            n = max(min(n, n_scored) - 1, 0)
        return 0 if self._keeps_state and n < len(known.tokens) else n

    def _bring_back(self, prompt: Sequence[int], n_alternatives: int) -> None:
        """Copy a stored sequence back that has more of a prompt than all others, if copying is quicker."""
        n = {kept: self._in_common(kept, prompt, n_alternatives) for kept in self.store}
        if not n:
            return
        best = max(n, key=n.__getitem__)
        n_more = n[best] - self._longest(prompt, n_alternatives)[1]
        if n_more < max(_LEAST_COPY, len(best.tokens) // _COPIED_IN_TIME):
            return
        slot = self._choose(None, 0)
        self.store.use(best)
        self._put_away(slot)  # what a cancelled answer left there may displace all that is stored
        if self.store.bring_back(best, slot.id):
            slot.tokens, slot.scores = list(best.tokens), list(best.scores)
            slot.n_alternatives = best.n_alternatives
            slot.used = next(self._ticks)

    def _choose(self, source: Slot | None, n: int) -> Slot:
        """Choose the sequence to write to: the source itself, unless too much of it would be lost."""
        others = [slot for slot in self._slots if slot.is_free and slot is not source]
        empty = next((slot for slot in others if not slot.tokens), None)
        if source is not None and source.is_free:
            if len(source.tokens) - n < _LEAST_COPY or self._keeps_state:
                return source
            if not others:
                return source
        return empty or min(others, key=_by_use)

    def cut(self, slot: Slot, n: int) -> None:
        """Forget what follows the first n tokens; or all, where the model has a running state."""
        can_cut = n and not self._keeps_state
        if can_cut and self._api.llama_memory_seq_rm(self._memory, slot.id, n, -1):
            del slot.tokens[n:]
        else:
            self.forget(slot)

    def leave(self, slot: Slot) -> None:
        """End the use of a sequence; it stays in the cache until the next one begins, or `tidy`."""
        slot.is_free = True
        slot.used = next(self._ticks)

    def tidy(self, *, is_idle: bool) -> None:
        """Copy out what is not in use: it takes milliseconds that no answer should wait for.

        Where others are computed it leaves the cache, for attention looks at all tokens there. Where none
        is, what was used last also stays: the next request often goes on from it.
        """
        kept = self._unused()
        last = kept.pop() if is_idle and kept else None
        for slot in kept:
            self._put_away(slot)
        if last is not None:
            self._save(last)

    def evict(self) -> bool:
        """Take the unused sequence out of the cache that was kept longest; False where there is none."""
        kept = self._unused()
        if kept:
            self._put_away(kept[0])
        return bool(kept)

    def _unused(self) -> list[Slot]:
        """Find what is in the cache and in no use, what is longest unused first."""
        return sorted((slot for slot in self._slots if slot.is_free and slot.tokens), key=_by_use)

    def _put_away(self, slot: Slot) -> None:
        self._save(slot)
        self.forget(slot)

    def _save(self, slot: Slot) -> None:
        if len(slot.tokens) >= _LEAST_STORED:
            self.store.save(slot.id, slot.tokens, slot.scores, slot.n_alternatives)

    def forget(self, slot: Slot) -> None:
        """Empty a sequence."""
        self._api.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
        slot.tokens = []
        slot.scores = []

    def clear(self) -> None:
        """Empty all, after llama.cpp has failed."""
        for slot in self._slots:
            self.forget(slot)


def _by_use(slot: Slot) -> int:
    return slot.used
