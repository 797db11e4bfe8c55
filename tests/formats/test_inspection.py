from __future__ import annotations

import numpy as np
import pytest

from edgemerge.formats.inspection import SpecialToken, Template, TypeShare, inspect_model, shorten
from edgemerge.formats.quants.filetypes import FILE_TYPES
from tests.support.fake_source import FakeSource, tensor


def test_what_a_header_states() -> None:
    found = inspect_model(
        FakeSource(
            "/models/base",
            metadata={
                "llama.embedding_length": (256, "u32"),
                "llama.feed_forward_length": (512, "u32"),
                "llama.rope.freq_base": (5e5, "f32"),
                "llama.rope.scaling.type": ("yarn", "str"),
            },
        )
    )
    assert (found.name, found.architecture, found.file_type) == ("Fake", "llama", "F16")
    assert (found.layers, found.width, found.feed_forward, found.context) == (2, 256, 512, 256)
    assert (found.heads, found.kv_heads, found.head_size, found.value_size) == (4, 2, 64, 64)
    assert found.rope == {"freq_base": 5e5, "scaling.type": "yarn"}
    assert (found.experts, found.templates, found.provenance) == (None, (), None)
    assert found.is_tied
    assert found.active_elements == found.elements
    assert sum(share.elements for share in found.types) == found.elements
    assert sum(share.nbytes for share in found.types) == found.nbytes
    assert found.types[1] == TypeShare("F32", 3, 3 * 256, 3 * 1024)
    assert found.bits == pytest.approx(16, rel=0.01)


def test_what_a_header_does_not_state_is_none() -> None:
    found = inspect_model(
        FakeSource("/models/q", architecture="llama", without="output_norm.weight")
    )
    assert (found.width, found.feed_forward, found.head_size) == (None, None, None)


def test_of_stacked_experts_only_those_used_are_active() -> None:
    shape = (8, 4, 256)
    source = FakeSource(
        "/models/moe",
        metadata={"llama.expert_count": (8, "u32"), "llama.expert_used_count": (2, "u32")},
        extra=[
            tensor("blk.0.ffn_gate_exps.weight", shape),
            tensor("blk.0.ffn_gate_shexp.weight", (4, 256)),
        ],
    )
    found = inspect_model(source)
    assert (found.experts, found.experts_used) == (8, 2)
    assert found.elements - found.active_elements == 6 * 4 * 256


@pytest.mark.parametrize(
    ("number", "name"),
    [*((row.id, row.name) for row in FILE_TYPES.values()), (20, "IQ2_XS"), (999, "unknown (999)")],
)
def test_file_types_by_number(number: int, name: str) -> None:
    source = FakeSource("/models/a", metadata={"general.file_type": (number, "u32")})
    assert inspect_model(source).file_type == name


def test_other_file_types_are_llama_cpps() -> None:
    gguf = pytest.importorskip("gguf")
    for kind in gguf.LlamaFileType:
        if kind.name != "GUESSED":
            source = FakeSource("/models/a", metadata={"general.file_type": (int(kind), "u32")})
            name = str(inspect_model(source).file_type)
            assert name in (kind.name.removeprefix("MOSTLY_"), "F32"), kind


def test_the_tokenizer_and_its_special_tokens() -> None:
    special = {"bos": 1, "eot": 64, "padding": -1}
    source = FakeSource(
        "/models/a",
        metadata={f"tokenizer.ggml.{role}_token_id": (n, "i32") for role, n in special.items()}
        | {"tokenizer.ggml.pre": ("smollm", "str")},
    )
    found = inspect_model(source).tokenizer
    assert found is not None
    assert (found.model, found.pre, found.n_tokens) == ("gpt2", "smollm", 64)
    assert found.special == (
        SpecialToken("bos", 1, "t1"),
        SpecialToken("eot", 64, None),
        SpecialToken("padding", -1, None),
    )


def test_templates_the_default_first() -> None:
    source = FakeSource(
        "/models/a",
        metadata={
            "tokenizer.chat_template.tool_use": ("{{ tools }}", "str"),
            "tokenizer.chat_template": ("\n {% for m in messages %}\n", "str"),
        },
    )
    found = inspect_model(source).templates
    assert [template.name for template in found] == [None, "tool_use"]
    assert found[0].first_line == " {% for m in messages %}"
    assert Template(None, "").first_line == ""


def test_provenance_of_a_merge() -> None:
    source = FakeSource(
        "/models/a",
        metadata={
            "edgemerge.version": ("0.1.0", "str"),
            "edgemerge.method": ("ties", "str"),
            "edgemerge.seed": (7, "u64"),
            "edgemerge.recipe": ("{}", "str"),
            "edgemerge.inputs": (["base.gguf", "a.gguf"], "[str]"),
            "edgemerge.input_crc32": ([1, 0xFFFFFFFF], "[u32]"),
        },
    )
    found = inspect_model(source).provenance
    assert found is not None
    assert (found.version, found.method, found.seed, found.recipe) == ("0.1.0", "ties", 7, "{}")
    assert found.inputs == (("base.gguf", "00000001"), ("a.gguf", "ffffffff"))


def test_a_strangers_provenance_does_no_harm() -> None:
    source = FakeSource(
        "/models/a", metadata={"edgemerge.method": (1, "u32"), "edgemerge.inputs": ("x", "str")}
    )
    found = inspect_model(source).provenance
    assert found is not None
    assert (found.method, found.version, found.inputs) == ("1", "?", ())


def test_shorten_makes_any_value_fit_for_json() -> None:
    assert shorten({"a": (1, [np.inf, 2.5])}) == {"a": [1, ["inf", 2.5]]}
    assert shorten([0] * 65) == {"length": 65, "first": [0, 0, 0, 0]}
    assert shorten([0] * 64) == [0] * 64
