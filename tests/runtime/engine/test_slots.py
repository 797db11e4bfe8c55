"""Sequences that are taken, left and copied out, in an order that requests and cancels can bring about."""

from __future__ import annotations

import pytest

from edgemerge.runtime.engine.slots import Slot, Slots
from edgemerge.runtime.engine.store import Store
from tests.support.fake_llama import FakeLlama

FIRST = list(range(100, 150))
LONGER = [*FIRST, *range(200, 210)]
OTHER = list(range(300, 350))


def make_slots(api: FakeLlama, n_active: int, n_stored: int) -> Slots:
    """Sequences of a model with a running state: each is taken over as a whole."""
    store = Store(api, None, n_stored * api.SIZE)
    return Slots(api, None, n_active, 0, store, keeps_state=True)


def compute(slots: Slots, prompt: list[int]) -> Slot:
    """What a prompt's computation leaves in the cache."""
    slot = slots.take(prompt, len(prompt) - 1)
    assert slot is not None
    slot.tokens = list(prompt)
    slots._memory.cells[slot.id] = list(prompt)
    return slot


@pytest.mark.parametrize("left", [LONGER, [*FIRST[:-1], 7, 8, 9]])
def test_what_comes_back_may_be_displaced_by_what_makes_way_for_it(left: list[int]) -> None:
    """A cancelled answer is not copied out yet when the next one takes its sequence."""
    api = FakeLlama(keeps_state=True)
    slots = make_slots(api, n_active=1, n_stored=1)
    slots.leave(compute(slots, FIRST))
    slots.tidy(is_idle=False)
    slot = slots.take(OTHER, len(OTHER) - 1)
    assert slot is not None
    slot.tokens, api.cells[slot.id] = list(left), list(left)
    slots.leave(slot)
    slot = slots.take([*FIRST, 5], len(FIRST))
    assert slot is not None
    assert slot.tokens == api.cells[slot.id] == FIRST


def test_what_comes_back_is_the_last_to_be_displaced() -> None:
    api = FakeLlama(keeps_state=True)
    slots = make_slots(api, n_active=1, n_stored=2)
    for prompt in (FIRST, OTHER):
        slots.leave(compute(slots, prompt))
        slots.tidy(is_idle=False)
    slots.leave(compute(slots, list(range(400, 450))))
    slots.leave(compute(slots, [*FIRST, 5]))
    kept = [one.tokens for one in slots.store]
    assert FIRST in kept
    assert OTHER not in kept
