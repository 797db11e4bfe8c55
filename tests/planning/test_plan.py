from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemerge.budget import TARGET_ELEMENTS, workers_on
from edgemerge.errors import BudgetError, EdgemergeError, MismatchError, RecipeError
from edgemerge.formats.gguf.metadata import Value, get_value
from edgemerge.planning.plan import DEFAULT_MEMORY, make_plan
from edgemerge.types import ModelInput, Plan, Recipe, Rule, Slice, TensorJob
from tests.support.fake_source import AdaptedFake, FakeSource, by_path, tensor

BASE, A, B = Path("/m/base"), Path("/m/a"), Path("/m/b")
WEIGHT = {"weight": (Rule(1.0),)}


def recipe(method: str, *experts: Path, base: Path | None = None, **settings: Any) -> Recipe:
    """Recipe of whole models, all of weight 1, with parameters of the whole merge."""
    return Recipe(
        method=method,
        base=base,
        slices=(Slice(tuple(ModelInput(path) for path in experts)),),
        parameters={name: (Rule(value),) for name, value in settings.items()},
        defaults=WEIGHT,
    )


LINEAR = recipe("linear", A, B)
TIES = recipe("ties", A, B, base=BASE, density=0.5)


def planned(what: Recipe, *sources: FakeSource, **options: Any) -> Plan:
    given = by_path(*sources)
    opened = {path: given.get(path) or FakeSource(path) for path in what.models()}
    return make_plan(what, lambda path: opened[path], **options)


def value(plan: Plan, key: str) -> Value | None:
    return get_value(plan.metadata, key)


def job(plan: Plan, name: str) -> TensorJob:
    return next(job for job in plan.jobs if job.out.name == name)


def dtypes(plan: Plan) -> set[str]:
    return {job.out.dtype for job in plan.jobs if len(job.out.shape) > 1}


# -- file types ------------------------------------------------------------------------------------


def test_unquantised_inputs_become_f16() -> None:
    for stored in ("F32", "F16", "BF16"):
        plan = planned(LINEAR, FakeSource(A, dtype=stored), FakeSource(B, dtype="F16"))
        assert (plan.file_type, dtypes(plan)) == ("F16", {"F16"})
        assert job(plan, "output_norm.weight").out.dtype == "F32"
        assert value(plan, "general.file_type") == 1
        assert "general.quantization_version" not in plan.metadata


def test_quantised_inputs_keep_the_types_of_the_first() -> None:
    plan = planned(LINEAR, FakeSource(A, dtype="Q8_0"), FakeSource(B, dtype="Q4_0"))
    assert (plan.file_type, dtypes(plan)) == ("keep", {"Q8_0"})
    assert value(plan, "general.quantization_version") == 2


def test_an_unquantised_base_of_quantised_experts_gives_f16() -> None:
    plan = planned(TIES, FakeSource(A, dtype="Q4_K"), FakeSource(B, dtype="Q4_K"))
    assert (plan.file_type, dtypes(plan)) == ("F16", {"F16"})


def test_only_dtype_float32_changes_the_default() -> None:
    assert dtypes(planned(replace(LINEAR, dtype="float32"))) == {"F32"}
    assert dtypes(planned(replace(LINEAR, dtype="float16"))) == {"F16"}
    assert dtypes(planned(replace(LINEAR, dtype="bfloat16"))) == {"F16"}


@pytest.mark.parametrize("asked", ["Q8_0", "q8_0"])
def test_a_type_is_named_in_any_case(asked: str) -> None:
    plan = planned(replace(LINEAR, out_type=asked))
    assert (plan.file_type, dtypes(plan)) == ("Q8_0", {"Q8_0"})
    assert value(plan, "general.file_type") == 7


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("", "unknown type ''; known are F32, F16, "),
        ("Q9_X", "unknown type 'Q9_X'; known are F32, F16, "),
        ("q4_km", "unknown type 'q4_km'; did you mean 'Q4_K_M'?"),
        ("iq2_xs", "IQ2_XS can be read, not written; known are F32, F16, "),
    ],
)
def test_an_unknown_type_is_told_from_one_that_is_only_read(asked: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(replace(LINEAR, out_type=asked))
    assert str(caught.value).startswith(sentence)
    assert caught.value.field == "type"


@pytest.mark.parametrize("out_type", ["Q8_0", "keep"])
def test_a_stored_type_without_codec_is_refused_by_name(out_type: str) -> None:
    with pytest.raises(
        MismatchError, match=r"stored as F64, .*; get that model as F16, BF16 or F3"
    ):
        planned(replace(LINEAR, out_type=out_type), FakeSource(A, dtype="F64"))


# -- passes, memory, workers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "passes"),
    [
        ("linear", {}, 1),
        ("task_arithmetic", {}, 1),
        ("slerp", {"t": 0.5}, 2),
        ("ties", {"density": 0.5}, 3),
        ("ties", {"density": 1.0}, 1),
        ("breadcrumbs", {"density": 0.9}, 3),
        ("dare_linear", {"density": 0.5}, 2),
        ("dare_linear", {"density": 0.5, "rescale": "expectation"}, 1),
        ("della", {"density": 0.5}, 2),
        ("della", {"density": 0.5, "rescale": False}, 1),
        ("ties", {"density": 0.5, "rescale": True}, 4),
    ],
)
def test_reads_of_a_tensor_too_large_to_hold(
    method: str, settings: dict[str, Any], passes: int
) -> None:
    base = None if method == "linear" else BASE
    large = tensor("output.weight", (200_000, 256))
    sources = [FakeSource(path, extra=[large]) for path in (BASE, A)]
    plan = planned(recipe(method, A, base=base, **settings), *sources, memory=264 << 20)
    found = job(plan, "output.weight")
    assert found.passes == passes
    assert found.rows_per_block < found.out.n_rows
    cached_rows = found.cached_blocks * found.rows_per_block
    again = (passes - 1) * (found.out.n_rows - cached_rows)
    once = sum(t.spec.nbytes for j in plan.jobs for t in j.inputs)
    assert plan.read_bytes == once + again * sum(t.spec.row_bytes for t in found.inputs)
    if passes > 1:  # what fits the budget is read once even of such a tensor
        assert 0.4 < cached_rows / found.out.n_rows < 1.0


def test_a_tensor_that_is_held_whole_is_read_once() -> None:
    plan = planned(TIES)
    assert {j.passes for j in plan.jobs} == {1}
    assert all(j.cached_blocks == j.n_blocks for j in plan.jobs if j.method == "ties")
    assert plan.read_bytes == sum(t.spec.nbytes for j in plan.jobs for t in j.inputs)


def test_the_budget_is_the_callers_then_the_recipes_then_512_mib() -> None:
    assert planned(LINEAR).budget == DEFAULT_MEMORY == 512 << 20
    assert planned(replace(LINEAR, memory=400 << 20)).budget == 400 << 20
    assert planned(replace(LINEAR, memory=400 << 20), memory=300 << 20).budget == 300 << 20


def test_workers_are_at_most_threads_and_tensors() -> None:
    assert planned(LINEAR, threads=3).workers == 3
    assert planned(LINEAR, threads=1000).workers == len(planned(LINEAR).jobs)


@pytest.mark.parametrize("what", [LINEAR, TIES, recipe("della", A, B, base=BASE, density=0.5)])
def test_the_budget_that_an_error_names_works_and_a_mebibyte_less_does_not(what: Recipe) -> None:
    with pytest.raises(BudgetError) as caught:
        planned(what, memory=1 << 20, threads=4)
    needed = caught.value.needed
    assert caught.value.budget == 1 << 20
    assert str(caught.value) == (
        "a budget of 1 MiB is too small for this merge; "
        f"the smallest that works is --memory {needed >> 20}MiB"
    )
    plan = planned(what, memory=needed, threads=4)
    assert plan.workers >= 1
    assert all(j.rows_per_block >= 1 for j in plan.jobs)
    with pytest.raises(BudgetError):
        planned(what, memory=needed - (1 << 20), threads=4)


# -- models, counts, parameters --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            recipe("tise", A),
            "unknown merge method 'tise'; did you mean 'ties'?",
        ),
        (
            recipe("ties", A),
            "ties needs the base that the models were tuned from; "
            "give it with --base or base_model",
        ),
        (
            recipe("slerp", A, B, base=BASE, t=0.5),
            "slerp takes 1 model besides the base, not 2",
        ),
        (recipe("ties", BASE, base=BASE), "ties takes at least 1 model besides the base, not 0"),
        (recipe("passthrough", A, B), "passthrough takes 1 model, not 2"),
        (recipe("slerp", A, base=BASE), "slerp needs the parameter t"),
        (
            replace(LINEAR, defaults={}),
            "linear needs the parameter weight for a",
        ),
        (
            replace(LINEAR, defaults={}, parameters={"weight": (Rule(1.0, "mlp"),)}),
            "linear needs the parameter weight for a, and no rule gives one to token_embd.weight; "
            "add an entry with value alone",
        ),
        (
            replace(LINEAR, defaults={}, notes=("models[0] has 'wieght'; did you mean 'weight'?",)),
            "linear needs the parameter weight for a; models[0] has 'wieght'; did you mean 'weight'?",
        ),
        (
            replace(
                LINEAR, slices=(Slice((ModelInput(A, parameters={"weight": (Rule("0,5"),)}),)),)
            ),
            "the parameter weight of a is '0,5'; it must be a number",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(what: Recipe, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(what)
    assert str(caught.value) == message


def test_the_base_may_stand_among_the_models() -> None:
    plan = planned(recipe("ties", BASE, A, base=BASE))
    assert plan.models == (BASE, A)
    found = job(plan, "blk.0.attn_q.weight")
    assert found.base is not None
    assert [tensor.model for tensor in found.inputs] == [0, 1]


def test_filters_and_gradients_reach_the_right_tensors() -> None:
    t = (Rule((0.0, 1.0), "self_attn"), Rule(0.3))
    plan = planned(replace(recipe("slerp", A, base=BASE), parameters={"t": t}))
    assert [job(plan, f"blk.{i}.attn_q.weight").settings["t"] for i in (0, 1)] == [0.0, 1.0]
    assert job(plan, "blk.1.ffn_down.weight").settings["t"] == 0.3


def test_outside_the_layers_a_gradient_gives_its_first_value() -> None:
    plan = planned(recipe("slerp", A, base=BASE, t=(0.2, 0.8)))
    assert job(plan, "token_embd.weight").settings["t"] == 0.2
    assert job(plan, "output_norm.weight").settings["t"] == 0.2
    assert job(plan, "blk.1.attn_q.weight").settings["t"] == pytest.approx(0.8)


def test_a_models_own_parameter_goes_before_the_merges() -> None:
    own = Slice((ModelInput(A, parameters={"weight": (Rule(0.25),)}), ModelInput(B)))
    plan = planned(replace(LINEAR, slices=(own,), parameters={"weight": (Rule(0.75),)}))
    weights = [tensor.settings["weight"] for tensor in plan.jobs[0].experts]
    assert weights == [0.25, 0.75]


def test_what_the_method_never_looks_at_is_noted() -> None:
    own = Slice((ModelInput(A, parameters={"density": (Rule(0.5),), "normalize": (Rule(True),)}),))
    settings = {"gamma": (Rule(0.1),), "int8_mask": (Rule(True),)}
    plan = planned(replace(LINEAR, base=BASE, slices=(own,), parameters=settings))
    assert plan.notes == (
        "linear does not use the parameter gamma",
        "linear does not use the parameter density of a",
        "normalize belongs to the whole merge, so that of a is not used",
        "linear has no base: base gives the metadata, but its weights are not part of the merge",
    )
    assert planned(TIES).notes == ()


def test_tensors_that_only_one_model_has_are_refused() -> None:
    extra = tensor("blk.0.attn_q.bias", (256,), "F32")
    with pytest.raises(MismatchError, match=r"'blk.0.attn_q.bias' of /m/b is missing in /m/a"):
        planned(LINEAR, FakeSource(B, extra=[extra]))
    with pytest.raises(MismatchError, match=r"'output_norm.weight' is missing in /m/b"):
        planned(LINEAR, FakeSource(B, without="output_norm.weight"))


def test_constants_are_copied_from_the_first_model_and_may_be_missing_elsewhere() -> None:
    freqs = tensor("rope_freqs.weight", (32,), "F32")
    plan = planned(replace(LINEAR, out_type="Q8_0"), FakeSource(A, extra=[freqs]))
    found = job(plan, "rope_freqs.weight")
    assert found.is_byte_copy
    assert (found.out.dtype, len(found.inputs)) == ("F32", 1)


def test_adapters_count_while_neurons_are_matched() -> None:
    """Fault: matching them took more than the budget where a model had an adapter."""
    up = [tensor(f"blk.{layer}.ffn_up.weight", (512, 256)) for layer in range(2)]
    matched = replace(LINEAR, neurons=True)

    def least(other: FakeSource) -> int:
        with pytest.raises(BudgetError) as caught:
            planned(matched, FakeSource(A, extra=up), other, memory=1 << 20)
        return caught.value.needed

    plain, adapted = FakeSource(B, extra=up), AdaptedFake(B, extra=up)
    assert least(adapted) == least(plain) + 2 * adapted.held + adapted.reading


# -- metadata --------------------------------------------------------------------------------------


def test_the_output_says_what_it_is() -> None:
    split: dict[str, tuple[Any, str]] = {
        "split.count": (2, "u16"),
        "edgemerge.method": ("linear", "str"),
    }
    plan = planned(TIES, FakeSource(BASE, metadata=split))
    assert value(plan, "general.name") == "ties merge of base, a, b"
    assert value(plan, "llama.attention.head_count") == 4
    assert "split.count" not in plan.metadata
    assert "edgemerge.method" not in plan.metadata


def test_planning_opens_every_model_once() -> None:
    opened: list[Path] = []

    def open_model(path: Path) -> FakeSource:
        opened.append(path)
        return FakeSource(path)

    make_plan(recipe("ties", BASE, A, A, base=BASE), open_model)
    assert opened == [BASE, A]


def test_nothing_but_our_errors_comes_out_of_a_model_without_layers() -> None:
    broken = FakeSource(A)
    del broken._metadata["llama.block_count"]
    with pytest.raises(EdgemergeError, match=r"states no llama\.block_count"):
        planned(LINEAR, broken)


def test_only_a_tensor_that_would_hold_the_others_up_is_shared() -> None:
    target = TARGET_ELEMENTS
    for total, most, wanted in ((100, 1, 1), (500, 3, 3), (5000, 3, 1)):
        assert workers_on(100 * target, total * target, most) == wanted
    assert workers_on(4 * target, 5 * target, 3) == 1  # too few blocks
