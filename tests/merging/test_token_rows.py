"""Rows of tokens from wherever they are, read block by block: always the same, and what the rules say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgemerge
from edgemerge import budget
from edgemerge.budget import ArenaNeed
from edgemerge.errors import MismatchError, RecipeError
from edgemerge.planning import memory as planning
from edgemerge.provenance.inputs import check_inputs
from edgemerge.provenance.verification import verify_model
from edgemerge.token_rows import TokenRule
from edgemerge.types import Recipe
from tests.support.small_models import Float32, load_gguf, stored, wide_tensors, write_gguf
from tests.support.tiny_gguf import write_tiny_gguf

MIB = 1 << 20
WORDS = [f"w{i}" for i in range(40)]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.8},
    "ties": {"density": 0.5},
    "della": {"density": 0.6},
    "sce": {"select_topk": 0.4},
}


def write_model(path: Path, words: list[str], seed: int) -> Path:
    """Write a model of one layer; a token's rows are those of its word, changed by the seed."""
    rng = np.random.default_rng(1)
    of_words = rng.standard_normal((2, len(WORDS), 256)).astype(np.float32)
    tensors = wide_tensors(0) if not seed else wide_tensors(seed, near=wide_tensors(0))
    noise = np.random.default_rng(seed).standard_normal((2, len(words), 256))
    places = [WORDS.index(word) for word in words]
    for i, name in enumerate(("token_embd.weight", "output.weight")):
        rows = of_words[i][places] + (0.1 * noise[i] ** 3 if seed else 0)
        tensors[name] = rows.astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([])
    writer.add_vocab_size(len(words))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def recipe_of(method: str, models: list[Path], **changes: Any) -> Recipe:
    base, *experts = map(str, models)
    recipe = edgemerge.make_recipe(
        method,
        [(path, 0.3 + 0.2 * i) for i, path in enumerate(experts)],
        base=None if method == "linear" else base,
        parameters=METHODS[method],
        out_type=changes.pop("out_type", "F32"),
        seed=5,
    )
    return replace(recipe, **changes)


vocabularies = st.lists(st.sampled_from(WORDS), min_size=3, max_size=30, unique=True)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(vocabularies, min_size=3, max_size=3),
    method=st.sampled_from(sorted(METHODS)),
    source=st.sampled_from(["base", "union", "outside"]),
    multiple=st.sampled_from([None, 8]),
    out_type=st.sampled_from(["F32", "F16", "Q8_0"]),
    heights=st.lists(st.integers(1, 40), min_size=2, max_size=2),
    threads=st.integers(1, 3),
)
def test_block_height_threads_and_budget_do_not_show(
    tmp_path: Path,
    words: list[list[str]],
    method: str,
    source: str,
    multiple: int | None,
    out_type: str,
    heights: list[int],
    threads: int,
) -> None:
    models = [write_model(tmp_path / f"m{i}.gguf", w, i) for i, w in enumerate(words)]
    outside = write_model(tmp_path / "outside.gguf", words[0][::-1], 9)
    rules = {words[1][0]: TokenRule("model", models[1], force=True), "new": TokenRule("zero")}
    recipe = recipe_of(
        method,
        models,
        tokenizer_source=str(outside) if source == "outside" else source,
        tokens=rules,
        pad_to_multiple_of=multiple,
        out_type=out_type,
    )
    if method == "linear":  # which has no base: the rule's model is the first
        recipe = replace(recipe, tokens=rules | {words[1][0]: TokenRule("model", models[1])})
    fitting, made = budget.rows_in_arena, set()
    ways = ((0, 512, 1), (heights[0], 128, threads), (heights[1], 256, threads))
    for i, (height, memory, n_workers) in enumerate(ways):

        def capped(need: ArenaNeed, arena_bytes: int, height: int = height) -> int:
            rows = fitting(need, arena_bytes)
            return min(rows, height) if height else rows

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "rows_in_arena", capped)
            patch.setattr("edgemerge.planning.plan.workers_on", lambda *_, n=n_workers: n)
            out = tmp_path / f"out{i}.gguf"
            edgemerge.merge(recipe, out, memory=memory * MIB, threads=n_workers, force=True)
        made.add(out.read_bytes())
    assert len(made) == 1
    verify_model(out)
    check_inputs(out, models if method != "linear" else models[1:])


def rows_by_word(path: Path) -> dict[str, Float32]:
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    return dict(zip(tokens, load_gguf(path)["token_embd.weight"], strict=True))


def linear_of(tmp_path: Path, *words: list[str], **changes: Any) -> Recipe:
    models = [write_model(tmp_path / f"m{i}.gguf", w, i) for i, w in enumerate(words)]
    inputs = [(str(path), 1.0) for path in models]
    return replace(edgemerge.make_recipe("linear", inputs, out_type="F32"), **changes)


def test_a_token_of_one_model_lends_its_row_and_of_several_their_mean(tmp_path: Path) -> None:
    """Without a base among the models."""
    recipe = linear_of(
        tmp_path, ["w0", "w1"], ["w1", "w2"], ["w2", "w1", "w3"], tokenizer_source="union"
    )
    report = edgemerge.merge(recipe, tmp_path / "out.gguf")
    found = rows_by_word(tmp_path / "out.gguf")
    a, b, c = (rows_by_word(path) for path in recipe.models())
    assert list(found) == ["w0", "w1", "w2", "w3"]
    np.testing.assert_allclose(found["w0"], a["w0"], rtol=1e-6)
    np.testing.assert_allclose(found["w1"], (a["w1"] + b["w1"] + c["w1"]) / 3, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["w2"], (b["w2"] + c["w2"]) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["w3"], c["w3"], rtol=1e-6)
    assert {
        "rows of m0.gguf: 2 its own, 1 of m2.gguf, 1 the mean of the models that have them",
        "rows of m1.gguf: 2 its own, 1 of m0.gguf, 1 of m2.gguf",
        "rows of m2.gguf: 3 its own, 1 of m0.gguf",
    } <= set(report.notes)


def test_what_a_vocabulary_lacks_is_left_out_and_what_no_model_has_is_zero(tmp_path: Path) -> None:
    outside = write_model(tmp_path / "o.gguf", ["w1", "w9", "w2"], 4)
    recipe = linear_of(tmp_path, ["w0", "w1", "w2"], ["w2", "w1"], tokenizer_source=str(outside))
    report = edgemerge.merge(recipe, tmp_path / "out.gguf")
    found = rows_by_word(tmp_path / "out.gguf")
    assert list(found) == ["w1", "w9", "w2"]
    assert not found["w9"].any()
    assert "rows of m0.gguf: 2 its own, 1 zero; 1 of its rows is left out" in report.notes


def test_padding_is_the_mean_of_all_rows(tmp_path: Path) -> None:
    recipe = linear_of(tmp_path, WORDS[:5], WORDS[:5], pad_to_multiple_of=4)
    report = edgemerge.merge(recipe, tmp_path / "out.gguf")
    found = rows_by_word(tmp_path / "out.gguf")
    assert list(found)[5:] == ["[PAD5]", "[PAD6]", "[PAD7]"]
    rows = np.stack(list(found.values()))
    for row in rows[5:]:
        np.testing.assert_allclose(row, rows[:5].mean(axis=0), rtol=1e-5, atol=1e-6)
    assert "3 rows of padding follow, each the mean of all tokens' rows" in report.notes
    alone = edgemerge.make_recipe(
        "passthrough", [(str(tmp_path / "m0.gguf"), None)], out_type="Q8_0"
    )
    edgemerge.merge(alone, tmp_path / "q.gguf")
    again = edgemerge.make_recipe("passthrough", [(str(tmp_path / "q.gguf"), None)])
    edgemerge.merge(replace(again, pad_to_multiple_of=4), tmp_path / "p.gguf")
    assert len(rows_by_word(tmp_path / "p.gguf")) == 8


def test_stored_rows_are_copied_to_their_new_places(tmp_path: Path) -> None:
    """Without arithmetic, where one model is all there is."""
    model = write_model(tmp_path / "a.gguf", ["w0", "w1", "w2"], 1)
    order = write_model(tmp_path / "o.gguf", ["w2", "w7", "w0"], 2)
    quantised = edgemerge.make_recipe("passthrough", [(str(model), None)], out_type="Q4_K_M")
    edgemerge.merge(quantised, tmp_path / "q.gguf")
    recipe = edgemerge.make_recipe("passthrough", [(str(tmp_path / "q.gguf"), None)])
    edgemerge.merge(replace(recipe, tokenizer_source=str(order)), tmp_path / "out.gguf")
    before, after = (rows_by_word(tmp_path / name) for name in ("q.gguf", "out.gguf"))
    assert list(after) == ["w2", "w7", "w0"]
    for word in ("w0", "w2"):
        np.testing.assert_array_equal(after[word], before[word])
    assert not after["w7"].any()
    assert stored(tmp_path / "q.gguf").keys() == stored(tmp_path / "out.gguf").keys()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            TokenRule("model", Path("/m/none")),
            "gives 'w9' the row of /m/none, which is not merged here; name a model that is merged",
        ),
        (TokenRule("model", None), "a row of {0}, which does not have it; name"),
        (
            TokenRule("model", None, "w8"),
            "gives 'w9' a row of {0}, which does not have the token 'w8'",
        ),
        (
            TokenRule("model", None, 2),
            "gives 'w9' a row of {0}, which does not have the token 2; name",
        ),
    ],
)
def test_a_rule_that_finds_no_row_is_refused(tmp_path: Path, rule: TokenRule, message: str) -> None:
    recipe = linear_of(tmp_path, ["w0", "w1"], ["w1", "w0"])
    first = recipe.models()[0]
    if rule.model is None:
        rule = replace(rule, model=first)
    with pytest.raises(RecipeError) as caught:
        edgemerge.plan(replace(recipe, tokens={"w9": rule}))
    assert message.format(first) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_with_an_entry_per_token_are_refused_where_tokens_change_places(
    tmp_path: Path,
) -> None:
    recipe = linear_of(tmp_path, ["w0", "w1"], ["w1", "w0"], tokenizer_source="base")
    for path in recipe.models():
        reader = gguf.GGUFReader(path)
        writer = gguf.GGUFWriter(f"{path}.new", "llama")
        writer.add_block_count(1)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(reader.fields["tokenizer.ggml.tokens"].contents())
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.add_tensor("output.bias", np.zeros(2, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        Path(f"{path}.new").replace(path)
    with pytest.raises(MismatchError, match=r"'output\.bias' of .* has an entry for each token"):
        edgemerge.plan(recipe)


def test_a_union_of_vocabularies_of_two_kinds_is_refused(tmp_path: Path) -> None:
    first = write_model(tmp_path / "a.gguf", ["w0", "w1"], 0)
    other = write_tiny_gguf(tmp_path / "b.gguf")
    recipe = edgemerge.make_recipe("linear", [(str(first), 0.5), (str(other), 0.5)])
    with pytest.raises(RecipeError) as caught:
        edgemerge.plan(replace(recipe, tokenizer_source="union"))
    assert str(caught.value) == (
        "a union is made of byte-level BPE, SentencePiece, Unigram vocabularies, all of one kind, and that "
        f"of {first} is byte-level BPE, that of {other} SentencePiece; give base or one of the models as "
        "tokenizer_source"
    )


def test_a_vocabulary_of_a_model_that_tells_no_tokens_is_refused(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "a.gguf", wide_tensors(0))
    recipe = edgemerge.make_recipe("passthrough", [(str(model), None)])
    edgemerge.plan(replace(recipe, tokenizer_source="base"))
    with pytest.raises(RecipeError, match=r"a\.gguf tells no tokens, which the recipe asks for"):
        edgemerge.plan(replace(recipe, pad_to_multiple_of=8))
