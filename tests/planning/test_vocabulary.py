"""Whose tokens and whose chat template an output has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgemerge.errors import RecipeError
from tests.planning.test_plan import LINEAR, A, B, planned, value
from tests.support.fake_source import TOKENS, FakeSource


def test_the_tokenizer_is_the_bases_or_that_of_the_named_model() -> None:
    other = FakeSource(B, metadata={"tokenizer.ggml.model": ("llama", "str")})
    assert value(planned(LINEAR, other), "tokenizer.ggml.model") == "gpt2"
    asked = replace(LINEAR, tokenizer_source=str(B))
    assert value(planned(asked, other), "tokenizer.ggml.model") == "llama"


def test_a_union_of_equal_vocabularies_is_that_vocabulary() -> None:
    union = replace(LINEAR, tokenizer_source="union")
    assert planned(union).metadata == planned(LINEAR).metadata
    assert planned(union).jobs == planned(LINEAR).jobs


def test_a_union_of_vocabularies_of_two_kinds_is_refused() -> None:
    other = FakeSource(
        B, tokens=(*TOKENS, "x"), metadata={"tokenizer.ggml.model": ("llama", "str")}
    )
    with pytest.raises(RecipeError) as caught:
        planned(replace(LINEAR, tokenizer_source="union"), other)
    assert str(caught.value) == (
        "a union is made of byte-level BPE, SentencePiece, Unigram vocabularies, all of one kind, and that "
        "of /m/a is byte-level BPE, that of /m/b SentencePiece; give base or one of the models as "
        "tokenizer_source"
    )


def test_the_recipes_chat_template_goes_before_the_tokenizers() -> None:
    own = FakeSource(A, metadata={"tokenizer.chat_template": ("{{ a }}", "str")})
    assert value(planned(LINEAR, own), "tokenizer.chat_template") == "{{ a }}"
    asked = replace(LINEAR, chat_template="{{ b }}")
    assert value(planned(asked, own), "tokenizer.chat_template") == "{{ b }}"


def test_a_chat_template_that_only_an_expert_has_is_told() -> None:
    own = FakeSource(B, metadata={"tokenizer.chat_template": ("{{ b }}", "str")})
    said = "the output has no chat template, as a has none; b has one, and gives it as tokenizer_source"
    assert said in planned(LINEAR, own).notes
    assert said not in planned(LINEAR).notes
    assert said not in planned(replace(LINEAR, chat_template="{{ c }}"), own).notes
    assert said not in planned(replace(LINEAR, tokenizer_source=str(B)), own).notes
