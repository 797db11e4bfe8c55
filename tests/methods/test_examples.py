"""The worked examples of docstrings, as they are written there."""

from __future__ import annotations

import numpy as np
import pytest

from edgemerge.alignment.transport import transport
from edgemerge.methods.blocks import Block
from edgemerge.methods.pruning import EVERYTHING, Cut, CutPruner, RankPruner
from edgemerge.methods.selection import select_cuts
from edgemerge.methods.shared_tensor import ThreadGroup
from tests.support.memory_stream import MemoryStream


def test_cut_pruner() -> None:
    """The three largest of 5 -2 | 2 1 -2 2."""
    delta = np.array([5, -2, 2, 1, -2, 2], np.float32)
    two = int(np.float32(2).view(np.uint32))
    pruner = CutPruner(
        Cut(two, 0, 2), Cut(EVERYTHING, 0, 0), ThreadGroup(1, 2).join().row_sum((2,))
    )
    for number, part in enumerate((delta[:2], delta[2:])):
        block = Block(number, 2 * number, part.size, None, part.reshape(1, -1))
        pruner.prune(block, part)
    assert delta.tolist() == [5, -2, 2, 0, 0, 0]


def test_the_cut_of_the_example_is_found() -> None:
    delta = np.array([[5, -2, 2, 1, -2, 2]], np.float32)
    models = [(delta, {"weight": 1.0, "density": 0.5})]
    stream = MemoryStream("ties", np.zeros_like(delta), models, {}, 1, 0, "")
    (pruner,) = select_cuts(stream, dict(enumerate(stream.job.experts)), band=False).values()
    assert isinstance(pruner, CutPruner)
    assert pruner._cuts[0] == Cut(int(np.float32(2).view(np.uint32)), 0, 2)


def test_drop_by_rank() -> None:
    delta = np.array([0.1, -0.6, 0.3, 0.2, -0.5, 0.4], np.float32)
    scratch = np.empty(5 * 6 + 2049, np.uint32)
    pruner = RankPruner(1, 0.5, 0.25, False, scratch)
    pruner.prune(Block(0, 0, 6, None, delta.reshape(1, -1)), delta)
    assert np.array_equal(delta, np.array([0, -0.6, 0, 0, -0.5, 0.4], np.float32))


def test_transport() -> None:
    found = transport(np.array([[4.0, 1, 3], [2, 0, 5], [3, 2, 2]]))
    assert found.permutation.tolist() == [1, 0, 2]
    plan = 3 * found.plan.reshape(3, 3)
    assert np.round(plan, 2).tolist() == [[0, 0.96, 0.03], [0.96, 0.04, 0], [0.03, 0, 0.97]]
    assert (found.gap, found.exact) == (0.0, False)
    assert found.confidence == pytest.approx(0.96, abs=0.01)
