"""The mixtures against llama_model_quantize, which is what llama-quantize calls.

The models are random, a few rows per tensor: the choice depends on names, on row lengths and on the
header alone. Nobody loads them, so that a tensor may have any name.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgemerge.errors import MismatchError, RecipeError
from edgemerge.formats.quants.codec import CODECS, GGML_TYPES
from edgemerge.formats.quants.filetypes import (
    FILE_TYPES,
    dominant_file_type,
    keep_types,
    tensor_types,
)
from edgemerge.types import TensorSpec
from tests.support.llama_quantize import Model, Quantiser, converted, make_model, nbytes

gguf = pytest.importorskip("gguf")


def every_known_name(tied: bool = False) -> Model:
    """One matrix for each tensor name that gguf-py knows of any architecture.

    llama.cpp takes any name of five letters for one that ends in "weight" (rfind gives npos, and so
    does 5 - 6); we do not.
    """
    known = [pattern.format(bid=0, xid=0) for pattern in gguf.TENSOR_NAMES.values()]
    names = [name + suffix for name in known for suffix in (".weight", ".bias", "")]
    names = [name for name in names if len(name) < 64 and len(name) != 5]
    return make_model(extra={n: (2, 256) for n in names if n != "output.weight"}, tied=tied)


MODELS: dict[str, Callable[[], Model]] = {
    "llama 4": lambda: make_model(),
    "llama 22": lambda: make_model(n_layers=22),
    "llama 32 grouped": lambda: make_model(n_layers=32, heads=(32, 8)),
    "llama 70B": lambda: make_model(n_layers=80, heads=(64, 8)),
    "llama 65B": lambda: make_model(n_layers=80, heads=(64, 64)),
    "head counts per layer": lambda: make_model(n_layers=80, heads=([64] * 80, [8] * 79 + [64])),
    "tied": lambda: make_model(tied=True),
    "tied, 576": lambda: make_model(tied=True, n_cols=576, n_ff=1536),
    "640": lambda: make_model(n_cols=640, n_ff=2048),
    "48": lambda: make_model(n_cols=48, n_ff=80),
    "4 experts": lambda: make_model(n_layers=9, n_experts=4),
    "8 experts": lambda: make_model(n_layers=32, n_experts=8, heads=(32, 8)),
    "8 experts, 80 layers": lambda: make_model(n_layers=80, n_experts=8, heads=(64, 8)),
    "8 experts, 576": lambda: make_model(n_experts=8, n_cols=576, n_ff=48),
    "qwen2 28 tied": lambda: make_model("qwen2", 28, heads=(12, 2), tied=True),
    "qwen2 72B and a layer that looks ahead": lambda: make_model("qwen2", 81, n_next=1),
    "qwen2 72B": lambda: make_model("qwen2", 80, heads=(64, 64)),
    "qwen3moe": lambda: make_model("qwen3moe", 12, n_experts=16, heads=(32, 4)),
    "gemma2": lambda: make_model("gemma2", 26, tied=True, n_cols=768),
    "gemma3 640 tied": lambda: make_model("gemma3", 18, n_cols=640, n_ff=2048, tied=True),
    "phi3 fused": lambda: make_model("phi3", 32, fused=True),
    "falcon": lambda: make_model("falcon", 32, fused=True),
    "falcon 60, tied": lambda: make_model("falcon", 60, fused=True, tied=True),
    "falcon 544": lambda: make_model("falcon", 17, fused=True, n_cols=544),
    "falcon, 8 experts": lambda: make_model("falcon", 16, n_experts=8),
    "deci 80": lambda: make_model("deci", 80),
    "olmo 80": lambda: make_model("olmo", 80),
    "jais2 68": lambda: make_model("jais2", 68),
    "every known name": lambda: every_known_name(),
    "every known name, tied": lambda: every_known_name(tied=True),
}


@pytest.mark.llama
@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_quantize(name: str, quantiser: Quantiser) -> None:
    model = MODELS[name]()
    for file_type, row in FILE_TYPES.items():
        half = row.default if row.default in ("F32", "BF16") else "F16"
        oracle = quantiser.run(quantiser.write(model, converted(model, half)), file_type)
        before = model.specs(half)  # as a directory of safetensors has them
        ours = tensor_types(file_type, before, model.metadata(), model.architecture)
        assert ours == oracle, file_type


@st.composite
def models(draw: st.DrawFn) -> Model:
    n_layers = draw(st.integers(1, 34))
    model = make_model(
        draw(st.sampled_from(["llama", "qwen2", "gemma3", "phi3", "falcon"])),
        n_layers,
        n_cols=draw(st.sampled_from([16, 48, 64, 256, 576, 640])),
        n_ff=draw(st.sampled_from([48, 96, 256, 320])),
        n_experts=draw(st.sampled_from([0, 0, 1, 2, 8])),
        tied=draw(st.booleans()),
        fused=draw(st.booleans()),
        extra={
            f"blk.{i}.{name}.weight": (2, draw(st.sampled_from([48, 64, 256])))
            for i in draw(st.lists(st.integers(0, n_layers - 1), max_size=3))
            for name in ("attn_kv_b", "ffn_down_shexp", "attn_q_a")
        },
    )
    names = draw(st.permutations(list(model.shapes)))  # the order in the file does not matter
    missing = draw(st.sets(st.sampled_from(names), max_size=5)) - {"token_embd.weight"}
    model.shapes = {name: model.shapes[name] for name in names if name not in missing}
    return model


@pytest.mark.llama
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=models(), file_type=st.sampled_from([*FILE_TYPES][3:]))
def test_types_of_any_model_in_any_order(
    model: Model, file_type: str, quantiser: Quantiser
) -> None:
    specs = converted(model)
    oracle = quantiser.run(quantiser.write(model, specs), file_type)
    ours = tensor_types(file_type, specs, model.metadata(), model.architecture)
    assert ours == oracle
    assert list(ours) == list(specs)


@pytest.mark.llama
@pytest.mark.parametrize("dtype", ["BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M"])
def test_input_types_do_not_matter_to_what_is_quantised(
    dtype: str, file_type: str, quantiser: Quantiser
) -> None:
    model = make_model(n_cols=576, n_ff=1536, tied=True)
    specs = converted(model, half=dtype)
    oracle = quantiser.run(quantiser.write(model, specs), file_type)
    assert tensor_types(file_type, specs, model.metadata(), "llama") == oracle


@pytest.mark.llama
def test_expert_outside_the_layers_is_refused_as_llama_refuses_it(quantiser: Quantiser) -> None:
    model = make_model(n_experts=4, extra={"blk.4.ffn_down_exps.weight": (4, 2, 256)})
    specs = converted(model)
    assert quantiser.run(quantiser.write(model, specs), "Q4_K_M") is None
    with pytest.raises(MismatchError, match=r"'blk\.4\.ffn_down_exps\.weight' is in none of the 4"):
        tensor_types("Q4_K_M", specs, model.metadata(), "llama")


def test_what_is_not_quantised_has_the_converters_type() -> None:
    """attn_rel_b is the one of these that a converter writes in the file's own type."""
    shapes = {
        "blk.0.ffn_gate_inp.weight": (8, 256),  # router
        "blk.0.attn_rel_b.weight": (8, 256),
        "blk.0.ffn_up_exps.bias": (8, 256),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_up.weight": (8, 256),
    }
    model = make_model(extra=shapes)

    def types(file_type: str, dtype: str) -> list[str]:
        chosen = tensor_types(file_type, model.specs(dtype), model.metadata(), "llama")
        return [chosen[name] for name in shapes]

    assert types("Q4_0", "F16") == ["F32", "F16", "F32", "F32", "Q4_0"]
    assert types("Q4_0", "BF16") == ["F32", "BF16", "F32", "F32", "Q4_0"]
    assert types("Q4_0", "Q8_0") == ["F32", "F16", "F32", "F32", "Q4_0"]
    assert types("Q4_0", "F32") == ["F32", "F32", "F32", "F32", "Q4_0"]
    assert types("BF16", "F16") == ["F32", "BF16", "F32", "F32", "BF16"]
    assert types("F16", "F32") == ["F32", "F32", "F32", "F32", "F16"]
    assert types("F32", "Q8_0") == ["F32"] * 5


def test_ids_are_those_of_gguf() -> None:
    ids = {member.name.removeprefix("MOSTLY_"): int(member) for member in gguf.LlamaFileType}
    ids["F32"] = ids.pop("ALL_F32")
    assert {name: row.id for name, row in FILE_TYPES.items()} == {
        name: ids[name] for name in FILE_TYPES
    }
    ids |= {"Q4_K": ids["Q4_K_M"], "Q5_K": ids["Q5_K_M"], "Q3_K": ids["Q3_K_M"]}
    ids["MXFP4"] = ids.pop("MXFP4_MOE")
    for dtype in CODECS.keys() & ids.keys():
        model = make_model(n_layers=1)
        types = dict.fromkeys(model.shapes, dtype)
        assert dominant_file_type(types, model.specs()) == ids[dtype]


def test_keep_covers_every_type_of_weights() -> None:
    """Each type stays or becomes one of at least as many bits; the others are not for weights."""
    for dtype in GGML_TYPES.values():
        spec = TensorSpec("blk.0.ffn_up.weight", (2, 768), dtype, nbytes((2, 768), dtype))
        if dtype in {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}:
            with pytest.raises(MismatchError, match=dtype):
                keep_types({spec.name: spec})
            continue
        types, notes = keep_types({spec.name: spec})
        kept = types[spec.name]
        assert nbytes(spec.shape, kept) >= spec.nbytes
        assert (kept == dtype) == CODECS[dtype].can_encode == (not notes)


def test_keep_says_what_it_replaced() -> None:
    dtypes = {"a.weight": "IQ3_S", "b.weight": "IQ2_XS", "c.weight": "IQ3_S", "d.weight": "Q8_0"}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(dtypes, (2, 256))
    types, notes = keep_types(Model("llama", {}, shapes).specs(dtypes.__getitem__))
    assert list(types.values()) == ["Q3_K", "Q2_K", "Q3_K", "Q8_0"]
    assert notes == [
        "2 IQ3_S tensors written as Q3_K: edgemerge does not write IQ3_S",
        "1 IQ2_XS tensor written as Q2_K: edgemerge does not write IQ2_XS",
    ]


def test_dominant_file_type_counts_elements() -> None:
    model = make_model(extra={"output.weight": (99, 999)})
    types = {name: "Q6_K" if name == "output.weight" else "F16" for name in model.shapes}
    assert dominant_file_type(types, model.specs()) == FILE_TYPES["Q6_K"].id
    assert dominant_file_type({}, {}) == FILE_TYPES["F32"].id


def test_unknown_file_type_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match=r"'Q4_K'.*Q4_K_M") as caught:
        tensor_types("Q4_K", {}, {}, "llama")
    assert caught.value.field == "type"


def test_a_mixture_needs_the_number_of_layers() -> None:
    specs = make_model().specs()
    with pytest.raises(MismatchError, match=r"llama\.block_count"):
        tensor_types("Q5_K_M", specs, {}, "llama")
    assert tensor_types("Q8_0", specs, {}, "llama")["blk.0.ffn_down.weight"] == "Q8_0"


def test_importing_the_table_is_light() -> None:
    code = "import sys, edgemerge.formats.quants.filetypes; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
