"""Merges that move attention heads first: a permuted expert merges like the one it was made from."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from edgemerge import budget
from edgemerge.alignment.heads import SOFT_WARNING, align_models
from edgemerge.alignment.records import HeadPlan
from edgemerge.cli import make_app
from edgemerge.errors import BudgetError, RecipeError
from edgemerge.formats import open_model
from edgemerge.merging.run import merge, plan
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.runtime.llama import Model
from tests.merging.test_budget_rss import run_merge
from tests.support.head_merges import MOVED, PARAMETERS, combine, convert, largest_difference
from tests.support.head_models import head_tensors, shuffle
from tests.support.small_models import load_gguf, stored, write_gguf

Float32 = NDArray[np.float32]
Models = dict[str, Path]

MIB = 1 << 20
TYPES = ("F32", "F16", "Q8_0", "Q4_K_M")
COLLAPSE = 0.1  # no weight of the merged model may be so far off; without alignment some are


@pytest.fixture(scope="module")
def models(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    """Type -> name -> GGUF of the real models."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: convert(models_dir, folder, kind) for kind in TYPES}


def experts_of(found: Models, *names: str) -> list[Path]:
    return [found[f"expert-{name}"] for name in names]


# -- merge(base, A, permuted A) is A ---------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["tensor", "block", "row"])
@pytest.mark.parametrize("kind", TYPES)
def test_an_expert_and_its_permuted_copy_merge_to_the_expert(
    kind: str, scope: str, models: dict[str, Models], tmp_path: Path
) -> None:
    """Also from 4 bits: here a head of o is one sub-block, so moving it before quantising changes nothing."""
    found, output = models[kind], tmp_path / "out.gguf"
    options = {"parameters": {"weighting": "agreement", "scope": scope, "lambda": 1}}
    both = experts_of(found, "b", "b-permuted")
    report = combine("hierarchical", found["base"], both, output, **options)
    assert MOVED.format(f"expert-b-permuted-{kind}.gguf") in report.notes
    assert f"attention heads of expert-b-{kind}.gguf reordered in 0 of 4 layers" in report.notes
    wanted = load_gguf(found["expert-b"])
    assert largest_difference(load_gguf(output), wanted) <= 1e-6
    report = combine("hierarchical", found["base"], both, output, align="off", **options)
    assert report.notes == ()
    assert largest_difference(load_gguf(output), wanted) > COLLAPSE


def logits(path: Path, text: str) -> Float32:
    with Model(path, n_threads=2) as model:
        tokens = model.bos + model.tokenize(text)
        n = len(tokens)
        with model.context(n, n_batch=n, n_outputs=n, exact=True) as context:
            return context.decode(tokens, [True] * n).copy()


@pytest.mark.llama
def test_it_computes_what_the_expert_does(models: dict[str, Models], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    found, output = models["F32"], tmp_path / "out.gguf"
    both = experts_of(found, "b", "b-permuted")
    text = "Question: which of these substances is used against high blood pressure? Answer:"
    wanted = logits(found["expert-b"], text)
    assert np.abs(logits(found["expert-b-permuted"], text) - wanted).max() <= 1e-4
    combine("hierarchical", found["base"], both, output)
    assert np.abs(logits(output, text) - wanted).max() <= 1e-4
    combine("hierarchical", found["base"], both, output, align="off")
    assert np.abs(logits(output, text) - wanted).max() > 1.0


# -- every method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind"),
    [*((method, "F16") for method in PARAMETERS), ("ties", "Q8_0"), ("hierarchical", "Q4_K_M")],
)
def test_a_permuted_expert_merges_like_the_original(
    method: str, kind: str, models: dict[str, Models], tmp_path: Path
) -> None:
    """To the byte, masks and cuts included: these are counted in the reference's order."""
    found = models[kind]
    options: dict[str, Any] = {"parameters": PARAMETERS[method], "seed": 3, "out_type": "F16"}
    runs = {
        "wanted": (("a", "b"), "off"),
        "aligned": (("a", "b-permuted"), "hard"),
        "not aligned": (("a", "b-permuted"), "off"),
    }
    results = {}
    for name, (experts, align) in runs.items():
        output = tmp_path / f"{name}.gguf"
        combine(method, found["base"], experts_of(found, *experts), output, align=align, **options)
        results[name] = stored(output)
    assert results["aligned"] == results["wanted"]
    assert results["not aligned"] != results["wanted"]


@pytest.mark.parametrize("method", PARAMETERS)
def test_alignment_changes_nothing_between_fine_tunes_of_one_base(
    method: str, models: dict[str, Models], tmp_path: Path
) -> None:
    found = models["F16"]
    results = []
    for align in ("off", "hard", "soft"):
        output = tmp_path / f"{align}.gguf"
        both = experts_of(found, "a", "b")
        options: dict[str, Any] = {
            "parameters": PARAMETERS[method],
            "out_type": "Q8_0",
            "align": align,
        }
        report = combine(method, found["base"], both, output, **options)
        assert not any("reordered in 4" in note for note in report.notes)
        results.append(stored(output))
    assert results[0] == results[1] == results[2]


def test_safetensors_and_gguf_give_the_same_tensors(
    models_dir: Path, models: dict[str, Models], tmp_path: Path
) -> None:
    names = ("base", "expert-a", "expert-b-permuted")
    forms: list[list[Path]] = [[models_dir / name for name in names]]
    forms += [[models["F16"][name] for name in names]]
    forms += [[forms[0][0], forms[1][1], forms[0][2]], [forms[1][0], forms[0][1], forms[1][2]]]
    for scope in ("tensor", "block", "row"):
        results = []
        for base, *experts in forms:
            output = tmp_path / "out.gguf"
            combine("hierarchical", base, experts, output, parameters={"scope": scope})
            results.append(stored(output))
        assert all(result == results[0] for result in results[1:])


# -- soft --------------------------------------------------------------------------------------------------


def confusable(share: float, seed: int) -> list[dict[str, Float32]]:
    """Two models of which the second's heads, in another order, are the first's only in part."""
    first = head_tensors(4, 2, n_embd=64, key=16, value=16, seed=seed)
    noise = head_tensors(4, 2, n_embd=64, key=16, value=16, seed=seed + 100)
    moved = shuffle(first, [1, 0], [3, 2, 1, 0])
    rest = np.float32(np.sqrt(1 - share**2))
    return [first, {name: np.float32(share) * moved[name] + rest * noise[name] for name in moved}]


def soft_tensors(heads: HeadPlan, tensors: dict[str, Float32]) -> dict[str, Float32]:
    """Apply the transport plan as dense matrices."""

    def dense(mix: Any, length: int) -> NDArray[np.float64]:
        matrix = np.zeros((len(mix), len(mix)))
        for i, sources in enumerate(mix):
            for j, weight in sources:
                matrix[i, j] = np.float32(weight)
        return np.kron(matrix, np.eye(length)).astype(np.float64)

    by_head, by_group = dense(heads.soft_heads, 16), dense(heads.soft_groups, 16)
    result = {}
    for name, x in tensors.items():
        module = name.split(".")[2]
        if module == "attn_output":
            result[name] = (x @ by_head.T).astype(np.float32)
        else:
            result[name] = ((by_head if module == "attn_q" else by_group) @ x).astype(np.float32)
    return result


def test_soft_alignment_sums_heads_and_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = confusable(0.08, seed=0)
    paths = [write_gguf(tmp_path / f"{i}.gguf", model) for i, model in enumerate(tensors)]
    (heads,) = align_models(*map(open_model, paths), arena_bytes=8 * MIB)
    assert isinstance(heads, HeadPlan)
    assert not heads.is_identity
    assert heads.confidence < 0.96  # so that there is something to sum
    hashes = set()
    output = tmp_path / "out.gguf"
    for elements, threads in ((1 << 18, 1), (3 * 64, 3), (1, 2)):
        monkeypatch.setattr(budget, "TARGET_ELEMENTS", elements)
        run = {"threads": threads}
        report = combine("linear", paths[0], paths, output, align="soft", run=run)
        hashes.add(report.sha256)
    assert len(hashes) == 1
    assert report.notes[0] == SOFT_WARNING
    found, mixed = load_gguf(output), soft_tensors(heads, tensors[1])
    for name, x in tensors[0].items():
        assert np.isfinite(found[name]).all()
        assert np.abs(found[name] - (x + mixed[name]) / 2).max() <= 2e-6
    combine("linear", paths[0], paths, output, align="hard")
    assert largest_difference(found, load_gguf(output)) > 1e-3


def test_soft_alignment_of_the_real_models_is_finite(
    models: dict[str, Models], tmp_path: Path
) -> None:
    found = models["Q8_0"]
    for method in ("hierarchical", "ties", "slerp"):
        report = combine(
            method,
            found["base"],
            experts_of(found, "a", "b-permuted"),
            tmp_path / "out.gguf",
            align="soft",
            parameters=PARAMETERS[method],
        )
        assert SOFT_WARNING in report.notes
        assert all(np.isfinite(x).all() for x in load_gguf(tmp_path / "out.gguf").values())


# -- what the user says and is told --------------------------------------------------------------------------


RECIPE = """
merge_method: {method}
base_model: {base}
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{weight: 1.0}}
edgemerge: {{type: F16, align: {align}}}
"""


@pytest.mark.parametrize(
    ("method", "align", "plan_align"),
    [
        ("ties", "hard", "hard"),
        ("ties", "soft", "soft"),
        ("ties", "null", "off"),
        ("hierarchical", "off", "off"),  # YAML 1.1 reads false
        ("hierarchical", "'off'", "off"),
        ("hierarchical", "null", "hard"),
    ],
)
def test_recipes_say_how_to_align(
    method: str, align: str, plan_align: str, models: dict[str, Models], tmp_path: Path
) -> None:
    found = models["F16"]
    paths = {"base": found["base"], "a": found["expert-a"], "b": found["expert-b-permuted"]}
    (tmp_path / "recipe.yml").write_text(RECIPE.format(method=method, align=align, **paths))
    recipe = load_recipe(tmp_path / "recipe.yml")
    assert plan(recipe).align == plan_align
    report = merge(recipe, tmp_path / "out.gguf")
    moved = any("reordered in 4 of 4 layers" in note for note in report.notes)
    assert moved == (plan_align != "off")
    assert (SOFT_WARNING in report.notes) == (plan_align == "soft")


@pytest.mark.parametrize("align", ["maybe", "true", "1", "[hard]", "{a: b}", "Hard"])
def test_other_ways_to_align_are_refused(
    align: str, models: dict[str, Models], tmp_path: Path
) -> None:
    found = models["F16"]
    paths = {"base": found["base"], "a": found["expert-a"], "b": found["expert-b"]}
    (tmp_path / "recipe.yml").write_text(RECIPE.format(method="ties", align=align, **paths))
    with pytest.raises(RecipeError, match="choose one of hard, soft, full, off") as caught:
        load_recipe(tmp_path / "recipe.yml")
    assert caught.value.field == "align"
    assert "\n" not in str(caught.value)


def test_align_on_the_command_line(models: dict[str, Models], tmp_path: Path) -> None:
    found, output = models["F16"], tmp_path / "out.gguf"
    command = ["merge", "-m", "linear", *map(str, experts_of(found, "b", "b-permuted"))]
    command += ["-o", str(output), "--type", "F32", "--force"]
    wanted = load_gguf(found["expert-b"])
    for align, succeeds in (("hard", True), ("off", False), (None, False)):
        flags = [] if align is None else ["--align", align]
        result = CliRunner().invoke(make_app(), [*command, *flags], prog_name="edgemerge")
        assert (result.exit_code, result.stderr) == (0, "")
        assert (largest_difference(load_gguf(output), wanted) <= 1e-6) == succeeds
        assert ("reordered in 4 of 4 layers" in " ".join(result.stdout.split())) == succeeds
    result = CliRunner().invoke(make_app(), [*command, "--align", "maybe"], prog_name="edgemerge")
    assert result.exit_code == 1
    assert result.stderr == (
        "edgemerge: alignment is 'maybe'; choose one of hard, soft, full, off\n"
    )


# -- memory and provenance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("align", "scope"), [("hard", "tensor"), ("soft", "row")])
def test_the_smallest_budget_holds_in_a_fresh_process(
    align: str, scope: str, models: dict[str, Models], tmp_path: Path
) -> None:
    found = models["F16"]
    base, *experts = (str(found[name]) for name in ("base", "expert-a", "expert-b-permuted"))
    options: dict[str, Any] = {"parameters": {"scope": scope}, "align": align}
    recipe = make_recipe(
        "hierarchical", [(path, None) for path in experts], base=base, out_type="Q4_K_M", **options
    )
    with pytest.raises(BudgetError) as caught:
        plan(recipe, memory=64 * MIB)
    least = caught.value.needed
    arguments = ["-m", "hierarchical", "--base", base, *experts, "--type", "Q4_K_M"]
    arguments += ["--align", align, "-P", f"scope={scope}", "--memory", f"{least // MIB}MiB"]
    report = run_merge(arguments, tmp_path / "least.gguf")
    assert int(report["peak_rss_bytes"]) <= least == report["budget_bytes"]
    whole = merge(recipe, tmp_path / "whole.gguf", memory=2048 * MIB)
    assert report["sha256"] == whole.sha256


def checksums(path: Path) -> tuple[list[int], list[int]]:
    fields = gguf.GGUFReader(path).fields
    return tuple(  # type: ignore[return-value]
        list(fields[f"edgemerge.{key}_crc32"].contents()) for key in ("tensor", "input")
    )


def crc_of_crcs(path: Path, names: list[str]) -> int:
    data = stored(path)
    total = 0
    for name in names:
        total = zlib.crc32(zlib.crc32(data[name][1]).to_bytes(4, "little"), total)
    return total


@pytest.mark.parametrize("align", ["off", "hard"])
@pytest.mark.parametrize("method", ["hierarchical", "ties", "linear"])
def test_the_output_states_its_checksums(
    method: str, align: str, models: dict[str, Models], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(budget, "TARGET_ELEMENTS", 5 * 256)  # many blocks
    found, output = models["Q8_0"], tmp_path / "out.gguf"
    experts = experts_of(found, "a", "b-permuted")
    options: dict[str, Any] = {"parameters": PARAMETERS[method], "align": align}
    combine(method, found["base"], experts, output, out_type="Q4_K_M", **options)
    tensors, inputs = checksums(output)
    data = stored(output)
    assert tensors == [zlib.crc32(raw) for _, raw in data.values()]
    files = experts if method == "linear" else [found["base"], *experts]
    wanted = [crc_of_crcs(path, list(data)) for path in files]
    assert inputs[:-1] == wanted[:-1]
    assert (inputs[-1] == wanted[-1]) == (align == "off")


def test_copies_state_their_checksums(models: dict[str, Models], tmp_path: Path) -> None:
    path, output = models["Q8_0"]["expert-a"], tmp_path / "out.gguf"
    merge(make_recipe("passthrough", [(str(path), None)], out_type="keep"), output)
    tensors, inputs = checksums(output)
    data = stored(output)
    assert data == stored(path)
    assert tensors == [zlib.crc32(raw) for _, raw in data.values()]
    assert inputs == [crc_of_crcs(path, list(data))]


def test_aligning_imports_no_solver_where_heads_are_easy_to_tell_apart(
    models: dict[str, Models], tmp_path: Path
) -> None:
    found = models["F16"]
    code = (
        "import sys; from edgemerge.merging.run import merge; "
        "from edgemerge.recipe.recipe import make_recipe; "
        "base, a, b, out = sys.argv[1:]; "
        "merge(make_recipe('hierarchical', [(a, None), (b, None)], base=base), out); "
        "print([name for name in ('scipy.optimize', 'ot') if name in sys.modules])"
    )
    paths = [found["base"], *experts_of(found, "a", "b-permuted"), tmp_path / "out.gguf"]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
