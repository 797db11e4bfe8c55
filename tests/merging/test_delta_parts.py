"""Parts of a delta: factors of low rank, and the choice of bits for each tensor."""

from __future__ import annotations

import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemerge.errors import MismatchError
from edgemerge.formats.adapters.layout import ExtractedTensor
from edgemerge.merging.adapter_files import encode_part
from edgemerge.merging.adapter_parts import AdapterPart, Extracted, Spool, factor_parts
from edgemerge.merging.delta_choice import Option, choose
from edgemerge.merging.delta_factors import factor_needs
from edgemerge.merging.delta_forms import LowRankForm
from edgemerge.merging.delta_pieces import Measured, TensorOut
from edgemerge.planning.differences import Change
from edgemerge.types import Source, TensorSpec


def test_the_factors_of_a_stack_are_never_in_memory_whole(tmp_path: Path) -> None:
    """Fault: only what one expert takes was counted, and workers wrote whole stacks."""
    count, rank, shape, nothing = 512, 32, (256, 128), cast("Source", None)
    spec = TensorSpec("blk.0.ffn_up_exps.weight", (count, *shape), "F32", 4 * count * 256 * 128)
    experts = [
        Change(spec.name, shape, nothing, nothing, (spec, spec), i, count) for i in range(count)
    ]
    with tempfile.TemporaryFile() as file:
        spool = Spool(file, tmp_path / "delta.gguf")
        at = spool.add(np.ones((256, rank), np.float32))
        found = [Extracted(one, rank, at, at) for one in experts]
        for part in factor_parts(nothing, found, spool, "F16", 1.0):
            tracemalloc.start()
            assert sum(piece.nbytes for piece in encode_part(part)) == part.tensor.spec.nbytes
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= max(factor_needs(experts, rank)) + 10_000


def test_a_factor_that_is_too_large_has_a_remedy_that_delta_knows() -> None:
    """Fault: it was --type, which belongs to extract."""
    name, measured = "blk.0.attn_q.weight.lora_a", cast("Measured", None)
    values = np.full((2, 2), 1e6, np.float32)
    part = AdapterPart(ExtractedTensor(name, (2, 2), "F16"), (lambda: values,))
    form = LowRankForm(measured, [part], 0.0, 1.0)
    with pytest.raises(MismatchError, match="that F16 cannot hold; give --bits"):
        form.write({name: TensorOut(lambda _raw, _at: None, 0)}, threading.Event())


# -- which bits ------------------------------------------------------------------------------------

OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 50)), max_size=4), min_size=1, max_size=3
)


@given(OPTIONS, st.integers(0, 60))
def test_what_is_chosen_fits_and_no_step_is_wasted(
    drawn: list[list[tuple[int, int]]], room: int
) -> None:
    tensors = [
        [Option(None, 0, 50.0), *(Option("Q1_0", nbytes, float(lost)) for nbytes, lost in tensor)]
        for tensor in drawn
    ]
    chosen = choose(tensors, room=room)
    assert sum(option.nbytes for option in chosen) <= room
    for option, tensor in zip(chosen, tensors, strict=True):
        better = [o for o in tensor if o.nbytes <= option.nbytes and o.lost < option.lost]
        assert not better
    lost = sum(option.lost for option in chosen)
    found = choose(tensors, lost=lost)
    assert sum(option.lost for option in found) <= lost + 1e-9


def test_an_option_above_the_hull_is_not_taken() -> None:
    options = [Option(None, 0, 10.0), Option("Q1_0", 4, 9.5), Option("Q2_K", 6, 1.0)]
    assert choose([options], lost=9.6)[0].dtype == "Q2_K"
    assert choose([options], room=5)[0].dtype is None
