from __future__ import annotations

from typing import Any

import gguf
import pytest

from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.constants import is_constant
from edgemerge.planning.compatibility import (
    DECISIVE_KEYS,
    TELLING_KEYS,
    check_models,
    find_tensor,
    same_shape,
)
from tests.planning.test_losses import FREQS, SmallSource
from tests.support.fake_source import N_VOCAB, FakeSource, tensor

BASE = FakeSource("/models/base")
TOKENS = tuple(f"t{i}" for i in range(N_VOCAB))


def refusal(other: FakeSource) -> MismatchError:
    with pytest.raises(MismatchError) as caught:
        check_models([BASE, other])
    return caught.value


def test_fine_tunes_of_one_base_fit_without_a_word() -> None:
    assert check_models([BASE, FakeSource("/models/a"), FakeSource("/models/b")]) == []
    assert check_models([BASE]) == []


def test_architectures_differ() -> None:
    assert str(refusal(FakeSource("/models/q", architecture="qwen2"))) == (
        "/models/base is a llama model and /models/q is a qwen2 model; "
        "only fine-tunes of one architecture can be merged"
    )


def test_head_counts_differ() -> None:
    other = FakeSource("/models/a", metadata={"llama.attention.head_count": (8, "u32")})
    assert str(refusal(other)) == (
        "llama.attention.head_count is 4 in /models/base and 8 in /models/a; "
        "only fine-tunes of one base can be merged"
    )


def test_the_integer_type_of_a_number_does_not_matter() -> None:
    same = {"llama.attention.head_count": (4, "u64"), "llama.context_length": (256, "i32")}
    assert check_models([BASE, FakeSource("/models/a", metadata=same)]) == []


@pytest.mark.parametrize("count", [64, 65])
def test_vocabularies_that_have_little_in_common(count: int) -> None:
    """Fault: as many tokens, of which none was the same, were merged row by row."""
    error = refusal(FakeSource("/models/a", tokens=("x",) * count))
    assert str(error) == (
        f"the vocabularies differ: 64 tokens in /models/base and {count} in /models/a, and 64 of those "
        "that both have are not the same; give fine-tunes of one base, or a recipe with "
        "tokenizer_source: base, which merges rows by the text of their tokens"
    )
    assert error.tensor == "token_embd.weight"
    assert error.shapes == ((64, 256), (count, 256))


def test_one_token_of_a_hundred_may_be_spelt_differently() -> None:
    tokens = [f"t{i}" for i in range(200)]
    base = FakeSource("/models/base", tokens=tokens)
    two, three = (FakeSource("/models/a", tokens=["x"] * n + tokens[n:]) for n in (2, 3))
    assert check_models([base, two]) == ["a spells some tokens differently from base"]
    with pytest.raises(MismatchError, match="3 of those that both have are not the same"):
        check_models([base, three])
    assert check_models([base, three], by_text=True) == []


@pytest.mark.parametrize(
    ("other", "note"),
    [
        (
            FakeSource("/models/a", metadata={"llama.context_length": (512, "u32")}),
            "llama.context_length is 256 in base and 512 in a",
        ),
        (
            FakeSource("/models/a", tokens=(*TOKENS, "[PAD64]", "[PAD65]")),
            "a has 66 tokens and base 64: its last 2 rows are left out",
        ),
        (
            FakeSource("/models/a", tokens=TOKENS[:60]),
            "a has 60 tokens and base 64: the last 4 rows, which it lacks, are merged without it",
        ),
    ],
)
def test_what_a_merge_survives_is_a_note(other: FakeSource, note: str) -> None:
    assert check_models([BASE, other]) == [note]


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("rope.scaling.type", "yarn", "str"),
        ("rope.scaling.factor", 4.0, "f32"),
        ("rope.freq_base", 500000.0, "f32"),
        ("attention.sliding_window", 1024, "u32"),
        ("attention.sliding_window_pattern", [True, False], "[bool]"),
        ("attention.layer_norm_epsilon", 0.5, "f32"),
        ("rope.freq_base_swa", 500000.0, "f32"),
        ("rope.scaling.attn_factor", 2.0, "f32"),
        ("rope.scaling.yarn_ext_factor", 0.5, "f32"),
        ("rope.scaling.yarn_attn_factor", 2.0, "f32"),
        ("rope.scaling.yarn_beta_fast", 16.0, "f32"),
        ("rope.scaling.yarn_beta_slow", 2.0, "f32"),
        ("rope.scaling.yarn_log_multiplier", 0.5, "f32"),
    ],
)
def test_what_only_one_model_states_is_a_note(key: str, value: Any, kind: str) -> None:
    """Fault: a tune for long texts lost its rope scaling, and what belongs to it, without a word."""
    other = FakeSource("/models/a", metadata={f"llama.{key}": (value, kind)})
    assert check_models([BASE, other]) == [f"llama.{key} is absent in base and {value} in a"]
    assert check_models([other, BASE]) == [f"llama.{key} is {value} in a and absent in base"]


@pytest.mark.parametrize(
    ("architecture", "key", "value", "kind"),
    [
        ("llama", "rope.scaling.type", "none", "str"),
        ("llama", "rope.scaling.type", "linear", "str"),
        ("llama", "rope.scaling.factor", 1.0, "f32"),
        ("llama", "rope.freq_base", 10000.0, "f32"),
        ("llama", "attention.sliding_window", 0, "u32"),
        ("gemma2", "attention.sliding_window", 4096, "u32"),
        ("gemma3", "rope.freq_base_swa", 10000.0, "f32"),
        ("llama", "rope.scaling.yarn_beta_fast", 32.0, "f32"),
        ("llama", "rope.scaling.attn_factor", 1.0, "f32"),
        ("llama", "rope.scaling.original_context_length", 128, "u32"),  # of what is not scaled
        (
            "llama",
            "attention.key_length",
            64,
            "u32",
        ),  # which follows from others where it is absent
    ],
)
def test_stating_what_goes_without_saying_is_no_difference(
    architecture: str, key: str, value: Any, kind: str
) -> None:
    stated = {f"{architecture}.{key}": (value, kind)}
    models = [
        FakeSource("/models/base", architecture=architecture),
        FakeSource("/models/a", architecture=architecture, metadata=stated),
    ]
    assert check_models(models) == check_models(models[::-1]) == []


def test_what_llama_cpp_takes_of_another_key_is_no_difference() -> None:
    def model(name: str, **more: tuple[Any, str]) -> FakeSource:
        base = {"rope.freq_base": (500000.0, "f32"), "rope.scaling.type": ("yarn", "str")}
        stated = {f"llama.{key}": value for key, value in (base | more).items()}
        return FakeSource(f"/models/{name}", metadata=stated)

    base = model("base")
    same = {
        "rope.freq_base_swa": (500000.0, "f32"),
        "rope.scaling.original_context_length": (256, "u32"),
    }
    assert check_models([base, model("a", **same)]) == []
    shorter = model("a", **{"rope.scaling.original_context_length": (128, "u32")})
    assert check_models([base, shorter]) == [
        "llama.rope.scaling.original_context_length is absent in base and 128 in a"
    ]


def test_all_keys_are_llama_cpps() -> None:
    known = {
        key
        for part in (gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.LLM)
        for key in vars(part).values()
        if isinstance(key, str)
    }
    assert {key.format("{arch}") for key in DECISIVE_KEYS + TELLING_KEYS} <= known


def test_constants_that_are_not_the_same_are_a_note() -> None:
    end = (
        "as a constant it is neither merged nor part of a delta or an adapter, and stays as it is in the "
        "base, or in the first model where there is no base"
    )
    base, other = (
        SmallSource(f"/models/{name}", [FREQS], i) for i, name in enumerate(("base", "a"))
    )
    assert check_models([base, base]) == []
    assert check_models([base, other]) == [
        f"rope_freqs.weight is not the same in base and a; {end}"
    ]
    assert check_models([BASE, other]) == [f"a has rope_freqs.weight and base has not; {end}"]
    assert check_models([other, BASE]) == [f"a has rope_freqs.weight and base has not; {end}"]


def test_an_unknown_layout_is_a_damaged_file() -> None:
    other = FakeSource("/models/a", metadata={"llama.tensor_data_layout": ("odd", "str")})
    with pytest.raises(FormatError, match="'odd' is unknown; convert the model anew") as caught:
        check_models([BASE, other])
    assert caught.value.path == other.path


def test_shapes_differ() -> None:
    left, right = tensor("blk.0.attn_q.weight", (4, 8)), tensor("blk.0.attn_q.weight", (8, 4))
    same_shape(left, left, BASE, BASE)
    with pytest.raises(MismatchError) as caught:
        same_shape(left, right, BASE, FakeSource("/models/a"))
    assert str(caught.value) == (
        "tensor 'blk.0.attn_q.weight' is [4, 8] in /models/base and [8, 4] in /models/a; "
        "only fine-tunes of one base can be merged"
    )
    assert caught.value.shapes == ((4, 8), (8, 4))


def test_a_tensor_is_missing() -> None:
    assert find_tensor(BASE, "output_norm.weight").shape == (256,)
    with pytest.raises(MismatchError) as caught:
        find_tensor(BASE, "output.weight")
    assert str(caught.value) == (
        "tensor 'output.weight' is missing in /models/base; "
        "only fine-tunes of one base can be merged"
    )


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("rope_freqs.weight", True),
        ("rope_factors_long.weight", True),
        ("blk.3.attn_rot_embd.weight", True),
        ("blk.3.attn_q.weight", False),
        ("token_embd.weight", False),
    ],
)
def test_constants_are_known_by_name(name: str, constant: bool) -> None:
    assert is_constant(name) == constant
