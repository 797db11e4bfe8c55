"""Records of a measurement survive their way through JSON; what is cut off is no message."""

from __future__ import annotations

import io
from typing import Any

import pytest

from edgemerge.runtime.bench.bench import BenchSettings, Measured
from edgemerge.runtime.bench.heat import Heat
from edgemerge.runtime.bench.messages import read_message, rebuild, write_message
from edgemerge.runtime.bench.peak_memory import MemorySplit
from edgemerge.runtime.bench.speed import Speed, SpeedTest
from edgemerge.runtime.evaluation.questions import Question

SPEED = Speed(SpeedTest(512, 0, 0, 2), "2026-01-01T00:00:00Z", (1, 2**60), (), 7, 0.1)
RECORDS = [
    BenchSettings((1, 2), n_gpu_layers=3),
    BenchSettings((4,)),
    Question("2 + 2 =\n", ("4", "\u00e9 \ud800"), 0),
    Measured(
        "llama",
        1,
        2,
        "CPU",
        1.0 / 3,
        (SPEED, SPEED),
        MemorySplit(5, 4, 3, 2, 1),
        Heat(None, 40.0, 41.5, ("cap",)),
        None,
    ),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was(record: Any) -> None:
    pipe = io.BytesIO()
    write_message(pipe, "done", record)
    pipe.seek(0)
    message = read_message(pipe)
    assert message is not None
    assert message[0] == "done"
    assert rebuild(type(record), message[1]) == record


def test_what_is_cut_off_is_no_message() -> None:
    for raw in (b"", b"[", b'["done", 1]'):
        assert read_message(io.BytesIO(raw)) is None


def test_another_kind_is_refused() -> None:
    for kind, value in ((int, "1"), (int, True), (float, None), (str, 1)):
        with pytest.raises(TypeError, match="is no"):
            rebuild(kind, value)
