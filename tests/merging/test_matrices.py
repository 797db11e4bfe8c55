"""How many matrices are worked on at a time, inside a budget."""

from __future__ import annotations

import pytest

from edgemerge.errors import BudgetError
from edgemerge.merging.matrices import count_workers
from edgemerge.types import Source
from tests.support.fake_source import AdaptedFake, FakeSource

MIB = 1 << 20


def least(*sources: Source) -> int:
    with pytest.raises(BudgetError) as caught:
        count_workers(sources, [MIB], 0, MIB, 2, what="this test")
    return caught.value.needed


def test_adapters_count_in_the_budget() -> None:
    """Fault: `extract`, `delta` and `compare` took more than they were given with adapters or deltas."""
    base, plain, adapted = FakeSource("/m/base"), FakeSource("/m/a"), AdaptedFake("/m/a+x")
    assert least(base, adapted) == least(base, plain) + 2 * adapted.held
