"""The rules of llama.cpp, each by a header that breaks it; test_odd_models.py asks llama.cpp itself."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from edgemerge.formats.gguf.metadata import Array, encode_value, get_value
from edgemerge.formats.llama_rules import find_violations
from edgemerge.formats.llama_rules.charsmap import leaves_table
from edgemerge.formats.llama_rules.mending import mend_metadata
from edgemerge.formats.llama_rules.rwkv import stuck_byte
from edgemerge.formats.llama_rules.vocabulary import CHARSMAP_KEY
from edgemerge.types import TensorSpec
from tests.support.architecture_models import convert
from tests.support.generated_models import make_model
from tests.support.odd_kinds import write_kind
from tests.support.open_gguf import SCORES, TOKENS, TYPES, OddModel, load_base
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_gguf import write_tiny_gguf

ADDS = "tokenizer.ggml.add_{}_token"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> OddModel:
    return load_base(write_tiny_gguf(tmp_path_factory.mktemp("rules") / "tiny.gguf"))


@pytest.fixture
def model(llama: OddModel) -> OddModel:
    return OddModel(dict(llama.metadata), dict(llama.tensors))


def violations(model: OddModel) -> list[str]:
    specs = {n: TensorSpec(n, s, t, len(data)) for n, (s, t, data) in model.tensors.items()}
    return [str(found) for found in find_violations(model.metadata, specs, model.architecture)]


def retype(model: OddModel, name: str, dtype: str) -> None:
    shape, _, data = model.tensors[name]
    model.tensors[name] = (shape, dtype, data)


def test_a_sound_model_breaks_no_rule(model: OddModel, tmp_path: Path) -> None:
    assert violations(model) == []
    assert violations(load_base(write_tiny_bert(tmp_path / "bert.gguf"))) == []
    assert mend_metadata(model.metadata) == (model.metadata, [])


def set_text(model: OddModel, i: int, text: bytes) -> None:
    texts = model.texts()
    texts[i] = text
    model.set(TOKENS, texts, "[str]")


@pytest.mark.parametrize(
    ("i", "text", "said"),
    [
        (270, b"er", "has the token 'er' under the ids 262 and 270"),
        (270, b"er\0x", "has the token 'er' under the ids 262 and 270"),  # a C string ends at NUL
    ],
)
def test_a_text_under_two_ids(model: OddModel, i: int, text: bytes, said: str) -> None:
    set_text(model, i, text)
    assert violations(model) == [said]


def test_an_empty_text_is_no_fault_but_its_name_may_be(model: OddModel) -> None:
    set_text(model, 270, b"")
    assert violations(model) == []
    set_text(model, 271, b"[EMPTY_270]")
    assert violations(model) == ["has the token '[EMPTY_270]' under the ids 270 and 271"]


def test_a_sentencepiece_vocabulary_without_byte_pieces(model: OddModel) -> None:
    texts = [b"-" + text[1:] if text.startswith(b"<0x") else text for text in model.texts()]
    model.set(TOKENS, texts, "[str]")
    (said,) = violations(model)
    assert said.startswith(
        "has a SentencePiece vocabulary without a token for 226 of the 256 bytes"
    )


@pytest.mark.parametrize("kind", ["none", "no_vocab"])
def test_no_vocabulary(model: OddModel, kind: str) -> None:
    model.set("tokenizer.ggml.model", kind, "str")
    assert violations(model) == [f"has no vocabulary (tokenizer.ggml.model is {kind})"]


def test_a_wordpiece_vocabulary_with_byte_tokens(model: OddModel) -> None:
    model.set("tokenizer.ggml.model", "bert", "str")
    said = "has tokens for bytes in a vocabulary that has none (tokenizer.ggml.model is bert)"
    assert violations(model) == [said]


def test_words_that_are_not_cut_at_spaces(model: OddModel) -> None:
    model.set("tokenizer.ggml.model", "gpt2", "str")
    assert violations(model) == []
    model.set("tokenizer.ggml.pre", "whitespace", "str")
    assert "which do not fit" in violations(model)[0]


def test_an_empty_vocabulary(model: OddModel) -> None:
    model.set(TOKENS, [], "[str]")
    assert violations(model) == ["has a vocabulary without tokens (tokenizer.ggml.tokens is empty)"]


@pytest.mark.parametrize(
    ("kind", "n", "key", "named"),
    [
        ("llama", 1, "bos", "bos"),  # default 1, beyond the vocabulary
        ("t5", 300, "bos", "bos"),  # no default
        ("gpt2", 11, "eos", "eos"),  # default 11
    ],
)
def test_a_token_that_is_added_and_not_named(
    model: OddModel, kind: str, n: int, key: str, named: str
) -> None:
    model.set("tokenizer.ggml.model", kind, "str")
    model.set(TOKENS, [b"<0x%02X>" % i if i < 256 else b"w%d" % i for i in range(n)], "[str]")
    for name in ("bos", "eos", "unknown"):
        model.metadata.pop(f"tokenizer.ggml.{name}_token_id", None)
    model.set(ADDS.format(key), True, "bool")
    said = f"says that {named} is put around every text, and names no such token"
    assert said in violations(model)
    mended, notes = mend_metadata(model.metadata)
    assert get_value(mended, ADDS.format(named)) is False
    assert any(f"add_{named}_token is now false" in note for note in notes)


@pytest.mark.parametrize(
    ("key", "value", "kind", "mended"),
    [
        ("tokenizer.ggml.bos_token_id", 1, "i32", (1, "u32")),
        ("tokenizer.ggml.bos_token_id", -1, "i32", None),
        ("tokenizer.ggml.add_bos_token", 1, "u8", (True, "bool")),
        (TYPES, [1] * 4, "[u32]", ([1] * 4, "[i32]")),
        (SCORES, [0.5] * 4, "[f64]", ([0.5] * 4, "[f32]")),
    ],
)
def test_a_key_of_a_type_that_llama_cpp_does_not_read(
    model: OddModel, key: str, value: object, kind: str, mended: tuple[object, str] | None
) -> None:
    model.set(key, value, kind)
    assert any(f"states {key} as {kind}" in said for said in violations(model))
    found, notes = mend_metadata(model.metadata)
    assert found.get(key) == (None if mended is None else encode_value(*mended))  # type: ignore[arg-type]
    assert len(notes) == 1


def test_a_name_by_which_llama_cpp_looks_for_phi3s_tokens(model: OddModel) -> None:
    model.set("general.name", "ties merge of Phi-3-med, phi3", "str")
    assert len(violations(model)) == 1
    mended, _ = mend_metadata(model.metadata)
    assert get_value(mended, "general.name") == "ties merge of Phi_3-med, phi_3"


@pytest.mark.parametrize(
    ("key", "value", "kind", "said"),
    [
        ("block_count", 0, "u32", "as 0, which must be 1 to 512"),
        ("block_count", 513, "u32", "as 513, which must be 1 to 512"),
        ("nextn_predict_layers", 3, "u32", "as 3, which must be 2 at most"),
        ("context_length", 0, "u32", "as 0, which must be at least 1"),
        ("rope.scaling.type", "su", "str", "as 'su', which must be one of none, linear"),
        ("attention.layer_norm_rms_epsilon", -1.0, "f32", "as -1.0, which must be 0 or more"),
        (
            "attention.layer_norm_rms_epsilon",
            float("nan"),
            "f32",
            "as nan, which must be 0 or more",
        ),
        ("expert_used_count", 2, "u32", "as 2, which must be 0 at most"),
        ("expert_count", 8, "u32", "expert_used_count as 0, which must be at least 1"),
        ("expert_count", 2000, "u32", "as 2000, which must be 1024 at most"),
        ("attention.head_count_kv", 3, "u32", "as 3, which must be a divisor of the 4 heads"),
        ("attention.head_count", 0, "u32", "as 0, which must be at least 1, as layer 0 has heads"),
        ("attention.head_count_kv", [2, 0], "[u32]", "as 0, which must be at least 1, as layer 1"),
        ("attention.value_length", 8, "u32", "as 8, which must be 16, as attention.key_length is"),
        ("rope.dimension_count", 8, "u32", "as 8, which must be 16, the length of a head"),
    ],
)
def test_a_number_that_llama_cpp_asserts(
    model: OddModel, key: str, value: object, kind: str, said: str
) -> None:
    model.set(f"llama.{key}", value, kind)
    assert any(said in found for found in violations(model)), violations(model)


def test_groups_of_experts(model: OddModel) -> None:
    for key, value in (("expert_count", 8), ("expert_used_count", 2), ("expert_group_count", 3)):
        model.set(f"llama.{key}", value, "u32")
    assert "llama.expert_group_count as 3, which must be a divisor of 8" in violations(model)[0]
    model.set("llama.expert_group_count", 4, "u32")
    assert "llama.expert_group_used_count as 0, which must be 1 to 3" in violations(model)[0]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("name", ["output_norm.weight", "blk.0.attn_norm.weight"])
def test_a_vector_that_is_not_f32(model: OddModel, name: str, dtype: str) -> None:
    retype(model, name, dtype)
    said = f"tensor {name!r} is {dtype} where llama.cpp computes with F32 alone"
    assert violations(model) == [said]


@pytest.mark.parametrize("kind", ["gpt-oss", "falcon-h1", "lfm2 moe"])
def test_heads_of_values_are_as_long_as_those_of_keys(kind: str, tmp_path: Path) -> None:
    """A graph of these takes it for granted, and ggml aborts at the product."""
    odd = load_base(write_kind(kind, tmp_path)[0])
    assert violations(odd) == []
    key = f"{odd.architecture}.attention.value_length"
    odd.set(key, 1, "u32")
    assert violations(odd) == [f"states {key} as 1, which must be 16, as attention.key_length is"]


@pytest.mark.parametrize(
    ("kind", "key", "value", "wanted"),
    [
        ("lfm2 moe", "expert_gating_func", 64, "1 to 4"),
        ("lfm2 moe", "expert_gating_func", 0, "1 to 4"),
        ("qwen3-vl", "n_deepstack_layers", 2, "1 at most"),
        ("granite hybrid", "ssm.inner_size", 2, "512, twice embedding_length"),
        ("falcon-h1", "ssm.time_step_rank", 0, "a divisor of the 128 of ssm.inner_size"),
        ("falcon-h1", "ssm.group_count", 3, "a divisor of the 128 of ssm.inner_size"),
    ],
)
def test_a_number_of_an_odd_kind(
    kind: str, key: str, value: int, wanted: str, tmp_path: Path
) -> None:
    odd = load_base(write_kind(kind, tmp_path)[0])
    odd.set(f"{odd.architecture}.{key}", value, "u32")
    assert violations(odd) == [
        f"states {odd.architecture}.{key} as {value}, which must be {wanted}"
    ]


def test_sections_of_the_rotation_that_are_longer_than_a_head(tmp_path: Path) -> None:
    odd = load_base(write_kind("qwen3-vl", tmp_path)[0])
    key = "qwen3vl.rope.dimension_sections"
    for sections in ([11, 11, 10, 0], [0, 0, 0, 0]):
        odd.set(key, sections, "[i32]")
        (found,) = violations(odd)
        assert found.startswith(f"states {key} as {sections}")
        assert found.endswith("which must be 1 to 16 in all")


def test_layers_that_share_keys_leave_two_that_do_not(tmp_path: Path) -> None:
    odd = load_base(convert(make_model("gemma4", tmp_path / "x"), tmp_path / "x.gguf"))
    assert violations(odd) == []
    key = "gemma4.attention.shared_kv_layers"
    odd.set(key, 5, "u32")
    assert violations(odd) == [f"states {key} as 5, which must be 2 less than the layers at most"]


def test_a_layer_that_uses_more_experts_than_the_first_or_none(tmp_path: Path) -> None:
    odd = load_base(write_kind("granite hybrid", tmp_path)[0])
    key = "granitehybrid.expert_used_count"
    odd.set(key, [2, 4], "[i32]")
    assert violations(odd) == [f"states {key} as 4, which must be 2 at most, as in the first layer"]
    odd.set(key, [4, 2], "[i32]")
    assert violations(odd) == []
    odd.set(key, [4, 0], "[i32]")
    assert violations(odd) == [
        f"states {key} as 0, which must be at least 1, as layer 1 has experts"
    ]


@pytest.mark.parametrize("part", ["ssm_a", "ssm_d", "ssm_conv1d.weight"])
def test_a_parameter_of_a_state_space_that_is_not_f32(model: OddModel, part: str) -> None:
    """Of two dimensions, as the converter writes them, and no matrix: Falcon-H1 aborted at ssm_d in F16."""
    name = f"blk.0.{part}"
    model.tensors[name] = ((8, 1), "F16", bytes(16))
    assert violations(model) == [f"tensor {name!r} is F16 where llama.cpp computes with F32 alone"]


def test_embeddings_that_are_longer_than_the_model_is_wide(model: OddModel) -> None:
    """Asked for one, llama.cpp reads so many numbers of a shorter row, and aborts."""
    model.set("llama.embedding_length_out", 65, "u32")
    assert violations(model) == [
        "states llama.embedding_length_out as 65, which must be 64 at most"
    ]
    model.tensors["dense_2.weight"] = ((65, 64), "F32", bytes(4 * 65 * 64))
    assert violations(model) == []


@pytest.mark.parametrize("dtype", ["I8", "I32", "F64", "Q8_1"])
def test_a_matrix_of_a_type_that_has_no_product(model: OddModel, dtype: str) -> None:
    retype(model, "blk.1.ffn_up.weight", dtype)
    said = f"tensor 'blk.1.ffn_up.weight' has the type {dtype}, which is not for weights"
    assert violations(model) == [said]


CONTROL, NORMAL, UNUSED = 3, 1, 5


@pytest.mark.parametrize(
    ("first", "second", "renamed"),
    [
        (NORMAL, NORMAL, 270),  # the later one
        (UNUSED, NORMAL, 262),
        (NORMAL, CONTROL, 262),
    ],
)
def test_of_two_tokens_with_one_text_one_is_renamed(
    model: OddModel, first: int, second: int, renamed: int
) -> None:
    set_text(model, 270, b"er")
    types = model.listed(TYPES)
    types[262], types[270] = first, second
    model.set(TYPES, types, "[i32]")
    mended, notes = mend_metadata(model.metadata)
    texts = get_value(mended, TOKENS)
    assert isinstance(texts, Array)
    assert texts[renamed] == f"[PAD{renamed}]"
    assert texts[262 + 270 - renamed] == "er"
    new_types = get_value(mended, TYPES)
    assert isinstance(new_types, Array)
    assert new_types[renamed] == UNUSED
    assert notes == [
        f"token {renamed} is now [PAD{renamed}]: llama.cpp wants every text once, and 'er' stood under 2 ids"
    ]
    model.metadata = mended
    assert violations(model) == []


def test_the_token_that_a_key_names_keeps_its_text(model: OddModel) -> None:
    set_text(model, 270, b"er")
    model.set("tokenizer.ggml.eot_token_id", 270, "u32")
    mended, _ = mend_metadata(model.metadata)
    texts = get_value(mended, TOKENS)
    assert isinstance(texts, Array)
    assert (texts[262], texts[270]) == ("[PAD262]", "er")


@pytest.mark.parametrize(
    ("texts", "byte"),
    [
        ([b"a", b"ab", b"\\x80", b"\\x80\\x81", b"\\n"], None),
        ([b"a", b"bc"], ord("b")),
        ([rb"\xe4\xbd"], 0xE4),
    ],
)
def test_a_byte_at_which_rwkvs_tokenizer_never_ends(texts: list[bytes], byte: int | None) -> None:
    assert stuck_byte(texts) == byte


def make_charsmap(units: dict[int, int], texts: bytes, n_units: int = 512) -> bytes:
    table = np.zeros(n_units, "<u4")
    for place, unit in units.items():
        table[place] = unit
    return struct.pack("<I", table.nbytes) + table.tobytes() + texts


ROOT, LEAF = 256 << 10, 1 << 8  # children of the root lie from 256 on
A, OF_A = 256 ^ ord("a"), 300  # where "a" leads, and where its value is
TO_VALUE = (A ^ OF_A) << 10


@pytest.mark.parametrize(
    ("units", "texts", "is_wrong"),
    [
        ({0: ROOT, A: ord("a") | LEAF | TO_VALUE, OF_A: 1}, b"x\0b\0", False),
        ({0: ROOT, A: ord("a") | LEAF | TO_VALUE, OF_A: 3}, b"x\0b", True),  # no NUL
        ({0: ROOT, A: ord("a") | LEAF | TO_VALUE, OF_A: 9}, b"x\0b\0", True),  # beyond the texts
        ({0: ROOT, A: ord("a") | LEAF | (1000 << 10), OF_A: 1}, b"x\0", True),  # beyond the table
        ({0: 600 << 10}, b"x\0", True),
        ({0: ROOT, A: ord("a"), A ^ ord("b"): ord("b") | (900 << 10)}, b"x\0", True),  # after two
        ({}, b"x\0", False),
    ],
)
def test_a_table_of_characters_that_points_outside(
    units: dict[int, int], texts: bytes, is_wrong: bool
) -> None:
    assert leaves_table(make_charsmap(units, texts)) == is_wrong


def test_a_vocabulary_with_such_a_table(model: OddModel) -> None:
    model.set("tokenizer.ggml.model", "t5", "str")
    model.set(CHARSMAP_KEY, list(make_charsmap({0: 600 << 10}, b"x\0")), "[u8]")
    assert any("has a table of characters" in said for said in violations(model))
