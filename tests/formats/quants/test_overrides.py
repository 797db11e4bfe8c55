"""Types for single tensors, against llama_model_quantize with tt_overrides."""

from __future__ import annotations

import pytest

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.formats.quants.filetypes import tensor_types
from edgemerge.formats.quants.overrides import TypeOverrides
from tests.support.llama_quantize import Quantiser, converted, make_model

CASES: dict[str, list[tuple[str, str]]] = {
    "one kind": [("attn_v", "Q8_0")],
    "the first match decides": [(r"blk\.0\..*", "Q8_0"), ("ffn_down", "Q2_K"), ("blk", "Q4_1")],
    "counters stand still": [(r"blk\.[024]\.(attn_v|ffn_down)", "Q5_0")],
    "norms and vectors stay": [("norm|bias|rope|gate_inp", "Q8_0")],
    "embeddings and output": [("^token_embd", "IQ4_XS"), ("^output.weight$", "Q4_0")],
    "floats": [("attn_q", "F32"), ("attn_k", "F16"), ("ffn_up", "BF16")],
    "the type it would have had": [("ffn", "Q4_K")],
    "rare types": [("attn_k", "TQ1_0"), ("attn_q", "MXFP4"), ("ffn_up", "TQ2_0")],
    "none is found": [("nowhere", "Q8_0")],
    "classes and counts": [(r"blk\.\d{1,2}\.ffn_(?:up|gate)(?=_exps|\.)", "Q3_K")],
}
MODELS = {
    "llama": lambda: make_model(n_layers=9, heads=(32, 8)),
    "576": lambda: make_model(n_layers=3, n_cols=576, n_ff=1536, tied=True),
    "48": lambda: make_model(n_layers=3, n_cols=48, n_ff=80),
    "8 experts": lambda: make_model(n_layers=9, n_experts=8, heads=(32, 8)),
}


@pytest.mark.llama
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_quantize(name: str, case: str, quantiser: Quantiser) -> None:
    model = MODELS[name]()
    specs = converted(model)
    source = quantiser.write(model, specs)
    for file_type in ("Q4_K_M", "Q2_K", "IQ4_XS", "Q8_0"):
        oracle = quantiser.run(source, file_type, CASES[case])
        overrides = TypeOverrides(CASES[case])
        types = tensor_types(
            file_type, specs, model.metadata(), model.architecture, overrides=overrides
        )
        assert types == oracle, file_type


@pytest.mark.llama
def test_a_row_without_fallback_is_refused_as_llama_refuses_it(quantiser: Quantiser) -> None:
    model = make_model(n_cols=96)
    specs = converted(model)
    assert quantiser.run(quantiser.write(model, specs), "Q8_0", [("attn_q", "NVFP4")]) is None
    with pytest.raises(MismatchError, match=r"attn_q.* rows of 96.*NVFP4 blocks of 64"):
        tensor_types(
            "Q8_0",
            specs,
            model.metadata(),
            "llama",
            overrides=TypeOverrides([("attn_q", "nvfp4")]),
        )


def test_patterns_that_decide_nothing_are_known() -> None:
    overrides = TypeOverrides([("attn", "q8_0"), ("attn_v", "Q4_0"), ("nothing", "Q4_0")])
    assert overrides.choose("blk.0.attn_v.weight") == "Q8_0"
    assert overrides.choose("output.weight") is None
    assert overrides.unused() == ["attn_v", "nothing"]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("attn_(", "Q8_0"), "no regular expression"),
        (("(?i)ATTN", "Q8_0"), "llama.cpp reads differently"),
        (("[[:alpha:]]", "Q8_0"), "llama.cpp reads differently"),
        (("attn", "Q9"), "choose one of F32, F16"),
        (("attn", "IQ2_XS"), "cannot be written as 'IQ2_XS'"),
        (("attn", "I8"), "cannot be written as 'I8'"),
    ],
)
def test_bad_patterns_and_types_are_refused(pair: tuple[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        TypeOverrides([pair])
    assert caught.value.field == "tensor_types"


@pytest.mark.parametrize("file_type", ["F16", "F32", "BF16"])
def test_files_that_are_not_quantised_have_no_overrides(file_type: str) -> None:
    model = make_model(n_layers=1)
    with pytest.raises(RecipeError, match=f"quantised type, not {file_type}"):
        tensor_types(
            file_type,
            model.specs(),
            model.metadata(),
            "llama",
            overrides=TypeOverrides([("attn", "Q8_0")]),
        )
