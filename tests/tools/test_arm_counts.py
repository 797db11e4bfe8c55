"""The benchmark of Arm: what its emulator computes and counts, of code that is compiled for AArch64."""

from __future__ import annotations

import importlib
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgemerge.native import load_kernel
from edgemerge.native.image import Image

pytest.importorskip("unicorn")
ROOT = Path(__file__).resolve().parents[2]

ADD_X0_X1 = 0x8B010000
ADD_S0_S1 = 0x1E212800
FMOV_W0_S0 = 0x1E260000
LOAD_X0_FROM_STACK = 0xF94003E0
LESS_1, BACK_IF_NOT_0 = 0xF1000400, 0x54FFFFE1  # subs x0, x0, #1; b.ne to it
RETURN = 0xD65F03C0


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def placed(emulator: Any, *words: int) -> int:
    return emulator.place(Image(struct.pack(f"<{len(words)}I", *words), 0, (), ()))


def test_arguments_go_where_functions_look_for_them() -> None:
    emulator = module("arm_emulator").Emulator()
    assert emulator.run(placed(emulator, ADD_X0_X1, RETURN), [2, 3]) == 5
    sum_of_floats = placed(emulator, ADD_S0_S1, FMOV_W0_S0, RETURN)
    found = emulator.run(sum_of_floats, [7, np.float32(0.5), np.float32(0.25)])
    assert found == np.float32(0.75).view(np.uint32)
    assert emulator.run(placed(emulator, LOAD_X0_FROM_STACK, RETURN), list(range(100, 110))) == 108


def test_every_instruction_is_counted_as_often_as_it_is_executed() -> None:
    emulator = module("arm_emulator").Emulator()
    loop = placed(emulator, LESS_1, BACK_IF_NOT_0, RETURN)
    assert emulator.call(loop, [10]).total == 2 * 10 + 1
    assert emulator.call(loop, [1000]).total == 2 * 1000 + 1


def test_a_kernel_for_arm_computes_the_same_and_uses_its_instructions(tmp_path: Path) -> None:
    """Half an instruction an element: AArch64 widens four halves at once."""
    emulator = module("arm_emulator").Emulator()
    name = "half.decode_f16"
    image = module("arm_compiler").images(tmp_path, "cortex-a72", [name])[name]
    address = emulator.place(image)
    halves = np.arange(1 << 16, dtype=np.uint16)
    found, here = np.zeros(halves.size, np.float32), np.zeros(halves.size, np.float32)
    whole = emulator.call_kernel(name, address, [halves, found])
    load_kernel("half", "decode_f16")(halves, here)
    assert (found.view(np.uint32) == here.view(np.uint32)).all()
    half = emulator.call_kernel(name, address, [halves[: 1 << 15].copy(), found[: 1 << 15].copy()])
    assert 0.4 < (whole.total - half.total) / (1 << 15) < 0.8


def test_windows_are_spaced_over_what_was_executed() -> None:
    prediction = module("arm_prediction")
    emulator = module("arm_emulator").Emulator()
    loop = placed(emulator, LESS_1, BACK_IF_NOT_0, RETURN)
    words = prediction.sample(emulator, emulator.call(loop, [100_000]))
    assert len(words) == prediction.WINDOWS * prediction.WINDOW
    assert set(words) == {struct.pack("<I", word) for word in (LESS_1, BACK_IF_NOT_0)}


@pytest.mark.parametrize(
    ("store", "parts"),
    [
        ("str\tq2, [x10], #16", "str\tq2, [x10]\nadd x10, x10, #16"),
        ("stp\tq0, q1, [x11, #-32]!", "stp\tq0, q1, [x11, #-32]\nadd x11, x11, #-32"),
        ("stp\tq0, q1, [x11, #-32]", "stp\tq0, q1, [x11, #-32]"),
        ("ldr\tq2, [x10], #16", "ldr\tq2, [x10], #16"),
    ],
)
def test_a_store_that_moves_its_address_becomes_two_instructions(store: str, parts: str) -> None:
    prediction = module("arm_prediction")
    assert prediction.WRITING_BACK.sub(prediction._split, store) == parts
