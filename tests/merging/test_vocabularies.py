"""Merges of models whose vocabularies nearly fit, and of tied models with models that have a head."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import edgemerge
from edgemerge import budget
from edgemerge.budget import ArenaNeed
from edgemerge.errors import MismatchError, VerificationError
from edgemerge.planning import memory as planning
from edgemerge.provenance.inputs import check_inputs
from edgemerge.runtime.llama import Model
from tests.support.odd_directories import ARCHITECTURES, edit_json
from tests.support.safetensors_files import read_safetensors, write_safetensors
from tests.support.small_models import load_gguf, stored

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
N, N_TOKENS = 336, 334  # rows of the models below, and how many of these are tokens'
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "linear": (2, {}),
    "slerp": (1, {"t": 0.3}),
    "task_arithmetic": (2, {"lambda": 0.8}),
    "ties": (2, {"density": 0.5}),
    "dare_ties": (2, {"density": 0.6}),
    "della": (2, {"density": 0.6}),
    "breadcrumbs": (2, {"density": 0.7, "gamma": 0.05}),
    "hierarchical": (2, {}),
}


class Models:
    """Fine-tunes of a small Llama, with as many rows as a test wants."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        self.folder, self.family = folder, family

    def make(self, name: str, seed: int, *, rows: int = N, head: str | None = None) -> Path:
        """Make a directory; a head is "own", "equal" or None: tied."""
        target = shutil.copytree(ARCHITECTURES / self.family, self.folder / name)
        rng = np.random.default_rng(seed)
        tensors = read_safetensors(target / "model.safetensors")
        tensors = {
            k: (x + 0.05 * rng.standard_normal(x.shape)).astype(np.float32)
            for k, x in tensors.items()
        }
        embedding = tensors[EMBEDDING]
        more = np.random.default_rng(seed + 100).standard_normal(
            (max(0, rows - N), embedding.shape[1])
        )
        tensors[EMBEDDING] = np.concatenate([embedding[:rows], more])
        tensors.pop(HEAD, None)
        if head is not None:
            tensors[HEAD] = tensors[EMBEDDING] * (1.5 if head == "own" else 1.0)
        write_safetensors(target / "model.safetensors", tensors)
        edit_json(target / "config.json", vocab_size=rows, tie_word_embeddings=head is None)
        return target

    def gguf(self, model: Path, out_type: str = "F32") -> Path:
        """Convert a directory."""
        target = self.folder / f"{model.name}-{out_type}.gguf"
        recipe = edgemerge.make_recipe("passthrough", [(str(model), None)], out_type=out_type)
        edgemerge.merge(recipe, target)
        return target

    def merge(
        self, out: str, method: str, base: Path | None, experts: list[Path], **options: Any
    ) -> tuple[Path, tuple[str, ...]]:
        """Merge; return the file and the notes."""
        n_experts, parameters = METHODS[method]
        recipe = edgemerge.make_recipe(
            method,
            [(str(path), weight) for path, weight in zip(experts, (0.6, 0.4), strict=False)][
                :n_experts
            ],
            base=None if method == "linear" or base is None else str(base),
            parameters=parameters,
            out_type=options.pop("out_type", "F32"),
            seed=5,
        )
        report = edgemerge.merge(recipe, self.folder / out, **options)
        return self.folder / out, report.notes


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def tokens_of(path: Path) -> list[str]:
    fields = gguf.GGUFReader(path).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    assert fields["llama.vocab_size"].contents() == len(tokens)
    return tokens


def runs(path: Path) -> bool:
    with Model(path, n_threads=1) as loaded, loaded.context(32, n_batch=32, n_outputs=1) as context:
        found = context.decode([1, 2, 3], [False, False, True])
        return bool(np.isfinite(found).all())


# Vocabularies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["directory", "gguf"])
@pytest.mark.parametrize("head", [None, "own"], ids=["tied", "head"])
def test_an_expert_padded_to_a_multiple_of_64_is_merged_by_the_common_rows(
    models: Models, method: str, form: str, head: str | None
) -> None:
    """The result is that of the expert without its padding."""
    base, plain, other = (models.make(f"m{i}", i, head=head) for i in range(3))
    padded = models.make("p", 1, rows=384, head=head)
    if form == "gguf":
        base, plain, other, padded = map(models.gguf, (base, plain, other, padded))
    expected, _ = models.merge("x.gguf", method, base, [other, plain])
    found, notes = models.merge("y.gguf", method, base, [other, padded])
    if method == "slerp":
        expected, _ = models.merge("x1.gguf", method, base, [plain])
        found, notes = models.merge("y1.gguf", method, base, [padded])
    if method in ("linear", "task_arithmetic", "slerp", "ties"):
        assert stored(found) == stored(expected)
    else:  # their random masks follow from the names of the models
        assert {n: t for n, (t, _) in stored(found).items()} == {
            n: t for n, (t, _) in stored(expected).items()
        }
    assert len(tokens_of(found)) == N
    first = "m0" if method != "linear" else "m2"
    stem = "" if form == "directory" else "-F32.gguf"
    assert f"p{stem} has 384 tokens and {first}{stem} 336: its last 48 rows are left out" in notes
    assert runs(found)


@pytest.mark.parametrize("head", [None, "own"], ids=["tied", "head"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp"])
def test_rows_that_an_expert_lacks_stay_the_bases(
    models: Models, method: str, head: str | None
) -> None:
    base = models.make("base", 0, rows=384, head=head)
    expert = models.make("a", 1, head=head)
    found, notes = models.merge("x.gguf", method, base, [expert, expert])
    tensors, originals = load_gguf(found), load_gguf(models.gguf(base))
    for name in ("token_embd.weight", "output.weight") if head else ("token_embd.weight",):
        assert tensors[name].shape == (384, 32)
        # slerp's two factors, which the whole tensor decides, add up to a little more than 1.
        rtol = 1e-3 if method == "slerp" else 0
        np.testing.assert_allclose(tensors[name][N:], originals[name][N:], rtol=rtol)
        assert not np.array_equal(tensors[name][:N], originals[name][:N])
    assert (
        "a has 336 tokens and base 384: the last 48 rows, which it lacks, are merged without it"
        in notes
    )
    assert runs(found)


def test_an_expert_with_the_bases_further_rows_changes_them(models: Models) -> None:
    """Task arithmetic in the rows that one expert of two has."""
    base = models.make("base", 0, rows=340)
    long, short = models.make("a", 1, rows=340), models.make("b", 2)
    found, _ = models.merge("x.gguf", "task_arithmetic", base, [long, short])
    ours, b, a = (
        load_gguf(p)["token_embd.weight"][N:] for p in (found, models.gguf(base), models.gguf(long))
    )
    np.testing.assert_allclose(ours, b + 0.8 * 0.6 * (a - b), rtol=1e-5, atol=1e-5)


def test_a_named_tokenizer_source_leaves_padding_out(models: Models, tmp_path: Path) -> None:
    """As in mergekit, whose tensors have a row for each token, and no other."""
    base, expert, other = models.make("base", 0), models.make("a", 1, rows=340), models.make("b", 2)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in (expert, other)],
        "dtype": "float32",
    }
    found: dict[str, Path] = {}
    for source in (None, "base", str(expert), "union"):
        (tmp_path / "r.yml").write_text(json.dumps(recipe | {"tokenizer_source": source}))
        name = Path(str(source)).name
        found[name] = tmp_path / f"{name}.gguf"
        report = edgemerge.merge(edgemerge.load_recipe(tmp_path / "r.yml"), found[name])
        check_inputs(found[name], [other, expert, base])
        said = "the last 2 rows of base have no token, and are left out"
        assert (said in report.notes) == (source in ("base", "union"))
    assert len(tokens_of(found["None"])) == N
    assert len(tokens_of(found["base"])) == N_TOKENS
    assert stored(found["a"]) == stored(found["union"]) == stored(found["base"])
    rows = load_gguf(found["a"])["token_embd.weight"]
    np.testing.assert_array_equal(rows, load_gguf(found["None"])["token_embd.weight"][:N_TOKENS])
    shutil.rmtree(other)
    other = models.make("b", 7)
    with pytest.raises(VerificationError, match="/b: is not the input of that name"):
        check_inputs(found["a"], [other, expert, base])


@pytest.mark.parametrize("out_type", ["F16", "Q8_0"])
def test_the_same_bytes_for_every_block_height_budget_and_thread_count(
    models: Models, monkeypatch: pytest.MonkeyPatch, out_type: str
) -> None:
    base = models.make("base", 0, rows=340)
    experts = [models.make("a", 1, rows=384), models.make("b", 2)]
    fitting = budget.rows_in_arena
    most = [0]

    def capped(need: ArenaNeed, arena_bytes: int) -> int:
        rows = fitting(need, arena_bytes)
        return min(rows, most[0]) if most[0] else rows

    monkeypatch.setattr(planning, "rows_in_arena", capped)
    for method in ("task_arithmetic", "ties", "della"):
        made = set()
        for i, (most[0], memory, threads) in enumerate(
            [(0, 512, 1), (1, 128, 1), (7, 128, 2), (335, 256, 2), (337, 512, 2)]
        ):
            out, _ = models.merge(
                f"{method}{i}.gguf",
                method,
                base,
                experts,
                out_type=out_type,
                memory=memory << 20,
                threads=threads,
            )
            made.add(out.read_bytes())
        assert len(made) == 1


def test_a_stopped_merge_goes_on_to_the_same_bytes(models: Models) -> None:
    base = models.make("base", 0, rows=340, head="own")
    experts = [models.make("a", 1, rows=384), models.make("b", 2)]
    whole, _ = models.merge("whole.gguf", "ties", base, experts, threads=1)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.merge("x.gguf", "ties", base, experts, threads=1, progress=stop)
    assert not (models.folder / "x.gguf").exists()
    found, _ = models.merge("x.gguf", "ties", base, experts, threads=1)
    assert found.read_bytes() == whole.read_bytes()


def test_quantised_inputs_of_different_vocabularies(models: Models) -> None:
    base = models.gguf(models.make("base", 0, rows=384), "Q8_0")
    expert = models.gguf(models.make("a", 1), "Q4_0")
    found, _ = models.merge("x.gguf", "task_arithmetic", base, [expert, expert])
    tensors, originals = load_gguf(found), load_gguf(base)
    np.testing.assert_array_equal(
        tensors["token_embd.weight"][N:], originals["token_embd.weight"][N:]
    )


def test_vocabularies_of_other_tokens_are_merged_by_text_or_refused(models: Models) -> None:
    base, other = models.make("base", 0, rows=N_TOKENS), models.make("a", 1, rows=340)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    ids = dict(zip(vocab, reversed(vocab.values()), strict=True))
    tokenizer["model"]["vocab"] = ids
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match="of those that both have are not the same"):
        models.merge("x.gguf", "task_arithmetic", base, [other, other])
    linear = edgemerge.make_recipe("linear", [(str(base), 0.5), (str(other), 0.5)], out_type="F32")
    for source in ("base", "union"):
        report = edgemerge.merge(
            replace(linear, tokenizer_source=source), models.folder / f"{source}.gguf"
        )
        assert "rows of a: 334 its own; 6 of its rows are left out" in report.notes
        check_inputs(report.output, [base, other])
    ours, left, right = (
        load_gguf(path)["token_embd.weight"]
        for path in (models.folder / "union.gguf", models.gguf(base), models.gguf(other))
    )
    places = [ids.get(text, i) for i, text in enumerate(tokens_of(models.folder / "union.gguf"))]
    np.testing.assert_allclose(ours, (left + right[places]) / 2, rtol=1e-6)
    assert stored(models.folder / "union.gguf") == stored(models.folder / "base.gguf")


# Heads


@pytest.mark.parametrize("form", ["directory", "gguf"])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties", "slerp"])
@pytest.mark.parametrize("untied", ["base", "expert"])
def test_a_tied_models_head_is_its_embedding(
    models: Models, method: str, untied: str, form: str
) -> None:
    """As if the tied model had stored its embedding once more."""
    heads = {"base": ("own", None), "expert": (None, "own")}[untied]
    base, expert = models.make("base", 0, head=heads[0]), models.make("a", 1, head=heads[1])
    as_untied = Models(models.folder / "untied")
    same_base, same_expert = (
        as_untied.make(name, seed, head=head or "equal")
        for name, seed, head in (("base", 0, heads[0]), ("a", 1, heads[1]))
    )
    if form == "gguf":
        base, expert = models.gguf(base), models.gguf(expert)
    experts, same = [base, expert], [same_base, same_expert]
    if method != "linear":
        experts, same = [expert], [same_expert]
        if method != "slerp":
            experts, same = experts * 2, same * 2
    found, _ = models.merge("x.gguf", method, base, experts)
    expected, _ = as_untied.merge("x.gguf", method, same_base, same)
    assert stored(found) == stored(expected)
    assert "output.weight" in stored(found)
    assert runs(found)
    check_inputs(found, [base, expert])


def test_no_head_is_written_where_none_differs_from_its_embedding(models: Models) -> None:
    base, expert = models.make("base", 0, head="equal"), models.make("a", 1)
    for first, second, out in ((base, expert, "x.gguf"), (expert, base, "y.gguf")):
        found, _ = models.merge(out, "task_arithmetic", first, [second, second])
        assert "output.weight" not in stored(found)
        assert runs(found)
        check_inputs(found, [base, expert])


def test_slices_of_a_tied_and_an_untied_model_end_with_the_last_ones_head(
    models: Models, tmp_path: Path
) -> None:
    tied, untied = models.make("t", 0), models.make("u", 1, head="own")
    for i, (first, last) in enumerate(((tied, untied), (untied, tied))):
        slices = [
            {"sources": [{"model": str(first), "layer_range": [0, 1]}]},
            {"sources": [{"model": str(last), "layer_range": [1, 2]}]},
        ]
        recipe = {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}
        (tmp_path / "r.yml").write_text(json.dumps(recipe))
        out = tmp_path / f"out{i}.gguf"
        edgemerge.merge(edgemerge.load_recipe(tmp_path / "r.yml"), out)
        original = load_gguf(models.gguf(last))
        head = original.get("output.weight", original["token_embd.weight"])
        np.testing.assert_array_equal(load_gguf(out)["output.weight"], head)
        assert runs(out)
