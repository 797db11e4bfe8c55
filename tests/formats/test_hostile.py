"""Hostile GGUF files (data/hostile/README.md) end in a FormatError, soon and in little memory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.model import GgufModel
from tests.support.bounded import bounded

HOSTILE = Path(__file__).resolve().parent.parent / "data" / "hostile"
CASES = [
    case
    for case in json.loads((HOSTILE / "cases.json").read_text(encoding="utf-8"))
    if case["file"].endswith(".gguf")
]
REFUSED = [case["file"] for case in CASES if case["want"].startswith("refuse")]
ACCEPTED = [case["file"] for case in CASES if case["want"].startswith("accept")]


def refusal(path: Path) -> str:
    """Message of the FormatError that a file ends in."""
    messages: list[str] = []

    def opens() -> None:
        with pytest.raises(FormatError) as caught:
            GgufModel(path)
        assert caught.value.path == path
        messages.append(str(caught.value))

    bounded(opens)
    return messages[0]


def read_all(path: Path) -> GgufModel:
    """Open a file and read every tensor of it."""
    model = GgufModel(path)
    for name, spec in model.specs().items():
        model.read_rows(name, 0, spec.n_rows, np.empty(spec.nbytes, np.uint8))
    model.close()
    return model


def test_every_case_is_there() -> None:
    assert sorted(REFUSED + ACCEPTED) == sorted(path.name for path in HOSTILE.glob("*.gguf"))
    assert len(REFUSED) > 30


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    path = HOSTILE / name
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message.removeprefix(str(path))) < 300
    sentence = message.removeprefix(f"{path}: ")
    assert not sentence.endswith(".")
    assert ". " not in sentence


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    bounded(lambda: read_all(HOSTILE / name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("G55_split_1_of_3.gguf", ("00002-of-00003.gguf", "00003-of-00003.gguf")),
        ("G56_lfs_pointer.gguf", ("git-LFS pointer",)),
        ("G07_big_endian.gguf", ("big-endian",)),
        ("G01_empty.gguf", ("empty",)),
    ],
)
def test_says_what_the_file_is(name: str, words: tuple[str, ...]) -> None:
    message = refusal(HOSTILE / name)
    assert all(word in message for word in words), message


def test_trailing_bytes_are_noticed() -> None:
    assert read_all(HOSTILE / "G51_trailing_garbage.gguf").trailing_bytes == 4096
    assert read_all(HOSTILE / "G00_valid.gguf").trailing_bytes == 0


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Every proper prefix of a valid file, so that no field is read unchecked."""
    whole = (HOSTILE / "G00_valid.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for n_bytes in range(len(whole)):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(FormatError):
            GgufModel(path)


def test_a_changed_byte_never_gives_another_error(tmp_path: Path) -> None:
    """Each byte of a valid file set to extremes: it opens, or ends in FormatError."""
    whole = (HOSTILE / "G00_valid.gguf").read_bytes()
    path = tmp_path / "changed.gguf"
    for at in range(len(whole)):
        for value in (0x00, 0x7F, 0x80, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(FormatError):
                GgufModel(path).close()
