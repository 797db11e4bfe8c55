from __future__ import annotations

import pytest

from edgemerge.runtime.engine.text import AnswerText


def spoken(raw: bytes, stops: tuple[str, ...] = (), size: int = 1) -> tuple[str, list[str], bool]:
    text = AnswerText(stops)
    pieces = []
    for start in range(0, len(raw), size):
        pieces.append(text.push(raw[start : start + size]))
        if text.is_stopped:
            return "".join(pieces), pieces, True
    return "".join(pieces) + text.finish(), pieces, False


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_characters_are_said_whole(size: int) -> None:
    words = "Grüße, 日本 🎉"
    whole, pieces, _ = spoken(words.encode(), size=size)
    assert whole == words
    assert not any("\ufffd" in piece for piece in pieces)
    assert spoken(words.encode()[:-1], size=size)[0] == "Grüße, 日本 \ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_texts_are_never_said(size: int) -> None:
    assert spoken(b"one two END three", ("END",), size)[::2] == ("one two ", True)
    assert spoken(b"one ENDX EN", ("ENDED", "ENDINGS"), size)[::2] == ("one ENDX EN", False)
    assert spoken(b"aaab", ("aab",), size)[::2] == ("a", True)
    assert spoken(b"one two", ("two", "one"), 100)[::2] == ("", True)  # the first in the text
    assert spoken(b"plain", ("",), size)[::2] == ("plain", False)


def test_text_is_held_back_only_while_it_may_become_a_stop_text() -> None:
    _, pieces, _ = spoken(b"a\n\nb\nUser:", ("\nUser:",))
    assert pieces == ["a", "", "\n", "\nb", "", "", "", "", "", ""]
