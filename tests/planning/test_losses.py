from __future__ import annotations

import numpy as np
import pytest

from edgemerge.errors import EdgemergeError
from edgemerge.planning.losses import foresee_losses, judge_merge
from edgemerge.planning.plan import make_plan
from edgemerge.types import ModelInput, Recipe, Rule, Slice, TensorSpec, UInt8
from tests.support.fake_source import FakeSource, by_path, tensor

BASE = FakeSource("/models/base")
FREQS = tensor("rope_freqs.weight", (32,), "F32")
SCALE = tensor("blk.0.attn_q.scale", (1,), "F32")


class SmallSource(FakeSource):
    """A header with a few small tensors that can be read: all bytes are `fill`."""

    def __init__(self, path: str, extra: list[TensorSpec], fill: int = 0) -> None:
        super().__init__(path, extra=extra)
        self.fill = fill

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        assert out_u8.nbytes <= 128
        out_u8[:] = np.uint8(self.fill)


# The fake has no attention values, which aligning heads needs.
HEADS = "the attention heads of 2 layers are never aligned: attn_v.weight is missing"


def test_a_plain_model_loses_nothing() -> None:
    outputs = [tensor(f"blk.{layer}.attn_output.weight", (256, 256)) for layer in range(2)]
    values = [tensor(f"blk.{layer}.attn_v.weight", (128, 256)) for layer in range(2)]
    assert foresee_losses(FakeSource("/models/a", extra=outputs + values)) == []


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (BASE, HEADS),
        (
            FakeSource("/models/a", metadata={"general.type": ("vocab", "str")}),
            "it says that it is of type vocab, and only whole models are merged",
        ),
        (
            FakeSource("/models/a", metadata={"llama.tensor_data_layout": ("odd", "str")}),
            "/models/a: its tensor_data_layout 'odd' is unknown; convert the model anew",
        ),
        (
            FakeSource("/models/a", extra=[tensor("blk.0.ffn_up.weight", (4, 256), "IQ2_XS")]),
            "1 IQ2_XS tensor written as Q2_K: edgemerge does not write IQ2_XS",
        ),
        (
            FakeSource("/models/a", extra=[tensor("blk.0.ffn_up.weight", (4, 256), "F64")]),
            "tensor 'blk.0.ffn_up.weight' is stored as F64, in which llama.cpp keeps no weights; "
            "get that model as F16, BF16 or F32",
        ),
        (
            FakeSource("/models/a", dtype="Q4_0"),
            "100 % of the parameters are quantised: a merge decodes them, and rounds anew what it "
            "writes; give the unquantised model where you have it",
        ),
        (
            FakeSource("/models/a", extra=[SCALE]),
            "1 tensor (blk.0.attn_q.scale) beside weights as their factors: such weights are "
            "merged only with those of a model that has the same factors",
        ),
        (
            FakeSource(
                "/models/a", extra=[tensor(f"blk.{i}.nextn.x.weight", (4,)) for i in range(4)]
            ),
            "4 tensors (blk.0.nextn.x.weight, blk.1.nextn.x.weight, blk.2.nextn.x.weight, …) that "
            "other llama models do not have: only models that have the same can be merged",
        ),
        (
            FakeSource("/models/a", extra=[FREQS]),
            "1 tensor (rope_freqs.weight) computed from the configuration: a merge takes the base's",
        ),
        (
            FakeSource("/models/a", metadata={"llama.attention.head_count_kv": ([2, 4], "[u32]")}),
            "slices can neither change the number of its layers nor re-order those that differ: it has "
            "settings per layer (llama.attention.head_count_kv)",
        ),
        (
            FakeSource("/models/a", metadata={"quantize.imatrix.file": ("x.dat", "str")}),
            "what tells how this file was made is left out (quantize.imatrix.file)",
        ),
        (
            FakeSource("/models/a", metadata={"edgemerge.method": ("ties", "str")}),
            "what it was merged from (edgemerge.…) gives way to what the new merge is made of",
        ),
    ],
)
def test_what_does_not_survive_a_merge(source: FakeSource, sentence: str) -> None:
    assert sentence in foresee_losses(source)


# -- against a base


def test_a_fine_tune_loses_nothing() -> None:
    verdict = judge_merge(BASE, FakeSource("/models/a"))
    assert (verdict.refused, verdict.lost) == ((), ())


def test_another_architecture_is_the_only_thing_said() -> None:
    verdict = judge_merge(BASE, FakeSource("/models/q", architecture="qwen2"))
    assert [sentence[:40] for sentence in verdict.refused] == [
        "/models/base is a llama model and /model"
    ]
    assert verdict.lost == ()


def test_every_kind_of_refusal_is_told_once() -> None:
    other = FakeSource(
        "/models/a",
        extra=[
            tensor("blk.0.attn_q.weight", (4, 256)),
            tensor("blk.0.ffn_down.weight", (4, 256), "F64"),
            tensor("blk.0.attn_gate.weight", (64, 256)),
        ],
        without="blk.1.attn_k.weight",
        metadata={"llama.attention.head_count": (8, "u32")},
    )
    assert judge_merge(BASE, other).refused == (
        "llama.attention.head_count is 4 in /models/base and 8 in /models/a; "
        "only fine-tunes of one base can be merged",
        "tensor 'blk.0.attn_gate.weight' of /models/a is missing in /models/base; "
        "only fine-tunes of one base can be merged",
        "tensor 'blk.0.attn_q.weight' is [256, 256] in /models/base and [4, 256] in /models/a; "
        "only fine-tunes of one base can be merged (and 2 more)",
        "/models/a: tensor 'blk.0.ffn_down.weight' is stored as F64, in which llama.cpp keeps no "
        "weights; get that model as F16, BF16 or F32",
    )


def test_different_factors_are_refused() -> None:
    left, right = SmallSource("/models/base", [SCALE], 0), SmallSource("/models/a", [SCALE], 1)
    assert judge_merge(left, left).refused == ()
    (sentence,) = judge_merge(left, right).refused
    assert "'blk.0.attn_q.scale'" in sentence


def test_the_bases_tokenizer_template_and_settings_are_taken() -> None:
    tokens = [f"t{i}" for i in range(64)]
    tokens[5:8] = ["new", "t7", "t6"]
    other = FakeSource(
        "/models/a",
        tokens=tokens,
        metadata={
            "llama.context_length": (512, "u32"),
            "llama.rope.scaling.type": ("yarn", "str"),
            "llama.attention.head_count": (4, "u64"),
            "tokenizer.chat_template": ("{{ x }}", "str"),
            "tokenizer.ggml.merges": (["a b"], "[str]"),
            "general.name": ("another", "str"),
        },
    )
    assert judge_merge(BASE, other).lost == (
        "its spelling of 1 token that base does not have: 'new'",
        "its numbering of 2 tokens that base has too",
        "its llama.context_length of 512: base has 256, which is taken",
        "its llama.rope.scaling.type of yarn: base has none",
        "its chat template (tokenizer.chat_template): base has none",
        "its tokenizer.ggml.merges: base has none",
    )


def test_a_quantised_base_costs_precision() -> None:
    base = FakeSource("/models/base", dtype="Q4_0")
    assert judge_merge(base, FakeSource("/models/a")).lost == (
        "precision: it has 16.0 bits per parameter, and the output, where --type names no other "
        "type, the 4.5 of base",
    )
    assert judge_merge(FakeSource("/models/a"), base).lost == ()


def test_rotary_constants_are_the_bases() -> None:
    base, other = SmallSource("/models/base", [FREQS], 0), SmallSource("/models/a", [FREQS], 1)
    assert judge_merge(base, base).lost == ()
    assert judge_merge(base, other).lost == (
        "its rope_freqs.weight: base has other values, which are taken",
    )
    assert judge_merge(BASE, other).lost == ("its rope_freqs.weight: base has none",)


@pytest.mark.parametrize(
    "other",
    [
        FakeSource("/models/a"),
        FakeSource("/models/a", dtype="Q4_0"),
        FakeSource("/models/a", dtype="F64"),
        FakeSource("/models/a", architecture="qwen2"),
        FakeSource("/models/a", tokens=("x",) * 65),
        FakeSource("/models/a", tokens=("x",) * 64),
        FakeSource("/models/a", extra=[tensor("output.weight", (64, 256), "Q8_0")]),
        FakeSource("/models/a", extra=[SCALE]),
        FakeSource("/models/a", extra=[FREQS]),
        FakeSource("/models/a", without="output_norm.weight"),
        FakeSource("/models/a", metadata={"llama.attention.head_count": (8, "u32")}),
        FakeSource("/models/a", metadata={"llama.context_length": (8, "u32")}),
    ],
)
@pytest.mark.parametrize("is_base", [False, True])
def test_a_merge_is_refused_where_it_was_said(other: FakeSource, is_base: bool) -> None:
    base, model = (other, BASE) if is_base else (BASE, other)
    recipe = Recipe(
        "task_arithmetic",
        base.path,
        (Slice((ModelInput(model.path),)),),
        {"weight": (Rule(1.0),)},
        out_type="F16",
    )
    try:
        make_plan(recipe, by_path(base, model).__getitem__)
        refusal = ""
    except EdgemergeError as error:
        refusal = str(error)
    refused = judge_merge(base, model).refused
    assert bool(refused) == bool(refusal)
    assert any(refusal in sentence for sentence in refused) or not refused
