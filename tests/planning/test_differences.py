"""Which tensors of two models are compared, and which are refused."""

from __future__ import annotations

import pytest

from edgemerge.errors import MismatchError
from edgemerge.planning.differences import list_changes
from edgemerge.planning.heads import has_own_head
from tests.planning.test_plan import LINEAR, A, B, planned
from tests.support.fake_source import FakeSource, tensor

EMPTY = [(0, 256), (256, 0), (2, 0, 256), (0,)]


@pytest.mark.parametrize("shape", EMPTY)
def test_a_tensor_without_elements_is_refused(shape: tuple[int, ...]) -> None:
    """Fault: `extract`, `delta` and `compare` ended in a traceback."""
    models = [FakeSource(path, extra=[tensor("blk.0.x.weight", shape)]) for path in (A, B)]
    with pytest.raises(MismatchError) as caught:
        list_changes(*models)
    assert str(caught.value) == (
        f"tensor 'blk.0.x.weight' of /m/a has the shape {list(shape)}, which holds nothing; "
        "get that model again"
    )


@pytest.mark.parametrize("shape", [(0, 256), (64, 0)])
def test_a_head_without_elements_is_refused_by_a_merge(shape: tuple[int, ...]) -> None:
    """Fault: a merge with a tied model ended in a traceback."""
    extra = [tensor(name, shape) for name in ("output.weight", "token_embd.weight")]
    assert has_own_head(FakeSource(A, extra=extra))
    models = [FakeSource(A, extra=extra), FakeSource(B, extra=extra[1:])]
    with pytest.raises(MismatchError, match=r"has the shape \[.*0.*\], which cannot be merged"):
        planned(LINEAR, *models)


def test_another_vocabulary_gets_a_remedy_that_the_command_has() -> None:
    """Fault: `extract` and `delta`, which take no recipe, named one with a tokenizer_source."""
    with pytest.raises(MismatchError, match=r"are not the same; give a base and its fine-tune$"):
        list_changes(FakeSource(A), FakeSource(B, tokens=("x",) * 64))
