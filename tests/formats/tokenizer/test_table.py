"""Vocabularies as metadata has them, compared by what they make of a text."""

from __future__ import annotations

import pytest

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.tokenizer.table import cut_alike

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def vocabulary(**changes: object) -> dict[str, bytes]:
    """Three tokens, one of which is control."""
    values = {
        "model": ("llama", "str"),
        "tokens": (["<s>", "a", "b"], "[str]"),
        "token_type": ([CONTROL, NORMAL, NORMAL], "[i32]"),
        "scores": ([0.0, -1.0, -2.0], "[f32]"),
        "add_space_prefix": (True, "bool"),
    }
    given = {name: (value, values[name][1]) for name, value in changes.items()}
    return {
        f"tokenizer.ggml.{name}": encode_value(value, kind)  # type: ignore[arg-type]
        for name, (value, kind) in (values | given).items()
    }


def test_vocabularies_that_cut_alike() -> None:
    assert cut_alike(vocabulary(), vocabulary())
    assert cut_alike({}, {})
    padded = vocabulary(
        tokens=["<|im_start|>", "a", "b", "<|im_end|>", "[PAD4]"],
        token_type=[CONTROL, NORMAL, NORMAL, CONTROL, UNUSED],
        scores=[1.0, -1.0, -2.0, 0.0, 0.0],
    )
    assert cut_alike(vocabulary(), padded)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "gpt2"},
        {"add_space_prefix": False},
        {"tokens": ["<s>", "b", "a"]},
        {"token_type": [CONTROL, NORMAL, USER_DEFINED]},
        {"scores": [0.0, -2.0, -1.0]},
        {"tokens": ["<s>", "a", "b", "ab"], "token_type": [CONTROL, NORMAL, NORMAL, NORMAL]},
    ],
)
def test_vocabularies_that_do_not(changes: dict[str, object]) -> None:
    assert not cut_alike(vocabulary(), vocabulary(**changes))
    assert not cut_alike(vocabulary(**changes), vocabulary())
    assert not cut_alike(vocabulary(), {})
