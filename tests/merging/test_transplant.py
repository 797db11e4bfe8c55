"""A model with another's tokenizer: mergekit's rows, the donor's ids, the same bytes in any memory."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.errors import BudgetError, FormatError, MismatchError, OutputError
from edgemerge.formats import open_model
from edgemerge.formats.adapters.adapted import held_bytes
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.tokenizer.shared import find_shared
from edgemerge.merging.pursuit import Rows, pursue
from edgemerge.merging.run import plan
from edgemerge.merging.transplant import _divide, _Limits, _Work, transplant
from edgemerge.merging.transplanted import TransplantedModel
from edgemerge.output.report import MergeReport
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Recipe
from tests.support.adapters import KINDS, write_adapter
from tests.support.architecture_models import ARCHITECTURES
from tests.support.fake_source import AdaptedFake, FakeSource
from tests.support.places import TESTS
from tests.support.safetensors_files import read_safetensors, write_safetensors
from tests.support.sources import read_all
from tests.support.transplants import KEPT, STEP, WIDE_DONOR, K, make_pair
from tests.support.vocabularies import EMBEDDING, HEAD, row_sums

ANSWERS = json.loads((TESTS / "data" / "transplants.json").read_text())
GGUF_NAMES = {EMBEDDING: "token_embd.weight", HEAD: "output.weight"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"))


def recipe_of(model: Path, donor: Path, out_type: str | None, out_format: str) -> Recipe:
    recipe = make_recipe("passthrough", [(str(model), None)], out_type=out_type)
    return replace(recipe, tokenizer_source=str(donor), out_format=out_format)


def run(
    model: Path,
    donor: Path,
    output: Path,
    *,
    k: int = K,
    out_type: str | None = None,
    memory: int | None = None,
    threads: int | None = None,
) -> MergeReport:
    out_format = "gguf" if output.suffix == ".gguf" else "hf"
    recipe = recipe_of(model, donor, out_type, out_format)
    return transplant(recipe, output, k=k, memory=memory, threads=threads)


def assert_near(found: list[float], wanted: list[float]) -> None:
    assert np.abs(np.array(found) - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_the_rows_are_those_of_mergekit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, donor = pair
    report = run(model, donor, tmp_path / "out")
    assert report.notes[0].startswith("of 365 tokens, 335 keep the model's rows, and 30 are")
    found = read_safetensors(tmp_path / "out" / "model.safetensors")
    for name, sums in ANSWERS["kin"].items():
        assert_near(row_sums(found[name])[KEPT:], sums)
    before = read_safetensors(model / "model.safetensors")
    assert all(np.array_equal(found[n], x) for n, x in before.items() if n not in (EMBEDDING, HEAD))


def test_a_donor_of_another_kind_and_width(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = pair
    run(model, WIDE_DONOR, tmp_path / "out.gguf", out_type="F32")
    with (
        closing(open_model(model)) as old,
        closing(open_model(WIDE_DONOR)) as donor,
        closing(open_model(tmp_path / "out.gguf")) as made,
    ):
        before, found = read_all(old), read_all(made)
        shared = find_shared(donor.metadata(), old.metadata())
        for key in ("tokens", "token_type", "scores", "bos_token_id", "eos_token_id", "model"):
            name = f"tokenizer.ggml.{key}"
            assert made.metadata()[name] == donor.metadata()[name]
    is_shared = shared >= 0
    assert is_shared.sum() == 132
    for name, gguf_name in GGUF_NAMES.items():
        assert np.array_equal(found[gguf_name][is_shared], before[gguf_name][shared[is_shared]])
        assert_near(row_sums(found[gguf_name][~is_shared][::STEP]), ANSWERS["wide"][name])


def test_directories_keep_the_donors_tokenizer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = pair
    run(model, WIDE_DONOR, tmp_path / "out", k=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (WIDE_DONOR / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 4096


def test_memory_and_threads_do_not_matter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = pair
    with pytest.raises(BudgetError, match="too small for k = 4; the smallest") as caught:
        run(model, WIDE_DONOR, tmp_path / "none.gguf", k=4, memory=16 * MIB)
    enough = caught.value.needed + 2 * MIB
    small = run(model, WIDE_DONOR, tmp_path / "small.gguf", k=4, memory=enough, threads=1)
    large = run(model, WIDE_DONOR, tmp_path / "large.gguf", k=4, threads=3)
    assert small.sha256 == large.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.gguf", "small.gguf"]


def test_quantised_rows_stay_as_they_are(tmp_path: Path) -> None:
    """The types of a quantised model are kept, and the bytes of the rows that it had."""
    model, donor = ARCHITECTURES / "mistral", ARCHITECTURES / "phi3"
    invoke("convert", str(model), "-o", str(tmp_path / "model.gguf"), "--type", "Q8_0")
    run(tmp_path / "model.gguf", donor, tmp_path / "out.gguf", k=8)
    with (
        closing(open_model(tmp_path / "model.gguf")) as old,
        closing(open_model(donor)) as theirs,
        closing(open_model(tmp_path / "out.gguf")) as made,
    ):
        assert {n: s.dtype for n, s in old.specs().items()} == {
            n: s.dtype for n, s in made.specs().items()
        }
        shared = find_shared(theirs.metadata(), old.metadata())[:383]  # the donor's last is padding
        before, found = read_all(old), read_all(made)
    for name in GGUF_NAMES.values():
        kept = shared >= 0
        assert np.array_equal(found[name][kept], before[name][shared[kept]])
        assert (np.abs(found[name][~kept]).max(axis=1) > 0).all()


def test_rows_of_a_type_that_is_only_read_become_f16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, donor = ARCHITECTURES / "mistral", ARCHITECTURES / "phi3"
    invoke("convert", str(model), "-o", str(tmp_path / "model.gguf"), "--type", "Q8_0")
    monkeypatch.setitem(CODECS, "Q8_0", replace(CODECS["Q8_0"], can_encode=False))
    run(tmp_path / "model.gguf", donor, tmp_path / "out.gguf", k=8, out_type="F16")
    with (
        closing(open_model(tmp_path / "model.gguf")) as old,
        closing(open_model(donor)) as theirs,
        closing(open_model(tmp_path / "out.gguf")) as made,
    ):
        shared = find_shared(theirs.metadata(), old.metadata())[:383]
        before, found = read_all(old), read_all(made)
    for name in GGUF_NAMES.values():
        wanted = before[name][shared[shared >= 0]].astype(np.float16)
        assert np.array_equal(found[name][shared >= 0], wanted)


def test_a_model_with_an_adapter(tmp_path: Path) -> None:
    base = ARCHITECTURES / "llama"
    model = f"{base}+{write_adapter(KINDS['lora'], tmp_path / 'adapter')}"
    run(Path(model), WIDE_DONOR, tmp_path / "out.gguf", k=1, out_type="F32")
    with closing(open_model(model)) as old, closing(open_model(tmp_path / "out.gguf")) as made:
        before, found = read_all(old), read_all(made)
    name = "blk.1.attn_q.weight"
    assert np.array_equal(found[name], before[name])


def test_adapters_count_in_the_budget() -> None:
    """Fault: `transplant --memory` took more than it was given where a model had an adapter."""

    def least(model: FakeSource, donor: FakeSource) -> int:
        rows = {GGUF_NAMES[EMBEDDING]: np.arange(4, dtype=np.int32)}
        work = _Work(model, donor, 1, {}, rows, {}, rows)
        with pytest.raises(BudgetError) as caught:
            _divide(work, _Limits(0, MIB, 1), donor.specs()[GGUF_NAMES[EMBEDDING]], 4)
        return caught.value.needed

    plain, adapted = FakeSource("/m/a"), AdaptedFake("/m/a+x")
    assert least(plain, adapted) == least(plain, plain) + 2 * adapted.held
    assert least(adapted, plain) == least(plain, plain) + 2 * adapted.held
    made = TransplantedModel(
        adapted, {}, {GGUF_NAMES[EMBEDDING]: np.arange(4, dtype=np.int32)}, {}, -1
    )
    assert held_bytes([made]) == adapted.held


def test_llama_cpp_runs_it_with_the_donors_ids(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from edgemerge.runtime.engine.messages import Sampling
    from edgemerge.runtime.generate import Session, read_prompt
    from edgemerge.runtime.llama import Model

    run(pair[0], WIDE_DONOR, tmp_path / "out.gguf", k=4)
    invoke("convert", str(WIDE_DONOR), "-o", str(tmp_path / "donor.gguf"))
    with (
        Model(tmp_path / "out.gguf", n_threads=1) as model,
        Model(tmp_path / "donor.gguf", n_threads=1) as donor,
        Session(model, 64, Sampling(temperature=0.0)) as session,
    ):
        prompt = read_prompt(model, "The Software shall be")
        assert prompt == read_prompt(donor, "The Software shall be")
        assert list(session.generate(prompt, 3))


# -- the command -----------------------------------------------------------------------------------


def invoke(command: str, *arguments: str) -> str:
    done = CliRunner().invoke(make_app([command]), [command, *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, donor = map(str, pair)
    said = invoke("transplant", model, donor, "-o", str(tmp_path / "out.gguf"), "--k", "4")
    assert "30 are combinations of at most 4 of these" in said
    with closing(open_model(tmp_path / "out.gguf")) as made:
        assert get_value(made.metadata(), "edgemerge.transplant.k") == 4
        assert get_value(made.metadata(), "edgemerge.transplant.donor") == "donor"
    assert (
        json.loads(invoke("verify", str(tmp_path / "out.gguf"), "--json"))["method"] == "transplant"
    )
    assert "transplant: tokens of donor, k 4" in invoke("verify", str(tmp_path / "out.gguf"))
    record = tmp_path / "record.html"
    invoke("record", str(tmp_path / "out.gguf"), "-o", str(record))
    assert "transplant: tokens of donor, k 4" in record.read_text()
    assert "passthrough:" not in record.read_text()
    assert ": transplant of model (" in invoke("inspect", str(tmp_path / "out.gguf"))


# -- refusals --------------------------------------------------------------------------------------


def test_k_may_not_be_more_than_the_common_tokens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"only 132 tokens in common.* give --k 132 or less"):
        run(pair[0], WIDE_DONOR, tmp_path / "out.gguf", k=133)


def test_vocabularies_without_texts_are_refused(tmp_path: Path) -> None:
    model = ARCHITECTURES / "llama"
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    for one, other in ((model, bare), (bare, model)):
        with pytest.raises((MismatchError, FormatError), match="token"):
            run(one, other, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_nan_in_the_donor_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, donor = make_pair(tmp_path)
    tensors = read_safetensors(donor / "model.safetensors")
    tensors[EMBEDDING][350, 3] = np.nan
    write_safetensors(donor / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=r"donor.*token_embd.weight.*NaN or infinity"):
        run(pair[0], donor, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "gguf_name"),
    [
        (EMBEDDING, "token_embd.weight"),
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
    ],
)
def test_nan_in_the_model_is_named_before_rows_are_looked_for(
    name: str, gguf_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: tensors without tokens were looked at when the long work was done."""
    model, donor = make_pair(tmp_path)
    tensors = read_safetensors(model / "model.safetensors")
    tensors[name][2, 3] = np.inf
    write_safetensors(model / "model.safetensors", tensors)
    monkeypatch.setattr("edgemerge.merging.transplant.pursue", None)
    with pytest.raises(FormatError) as error:
        run(model, donor, tmp_path / "out.gguf")
    assert str(error.value) == (
        f"{model}: tensor {gguf_name!r}: holds NaN or infinity at index "
        f"{2 * tensors[name].shape[1] + 3}; that model is damaged, get it again"
    )
    assert not (tmp_path / "out.gguf").exists()


def test_a_disk_that_takes_a_row_in_pieces_gets_all_of_it(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the tail of a row stayed zeros."""
    whole, write = run(*pair, tmp_path / "whole.gguf").sha256, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:100], offset))
    assert run(*pair, tmp_path / "out.gguf").sha256 == whole


def test_a_disk_that_is_full_under_new_rows_is_named(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    words = (
        r"out\.gguf: the disk cannot keep the new rows .* \(No space left on device\); free some"
    )
    with pytest.raises(OutputError, match=words):
        run(*pair, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_command_the_recipe_is_a_plain_one(pair: tuple[Path, Path]) -> None:
    """The recipe alone still means what it meant: new tokens of no model are zeros."""
    made = plan(recipe_of(*pair, None, "gguf"))
    assert any("zero" in note for note in made.notes)


# -- the pursuit -----------------------------------------------------------------------------------


def test_a_combination_is_found_again_and_zero_is_none(pair: tuple[Path, Path]) -> None:
    with closing(open_model(pair[1])) as donor, ThreadPoolExecutor(2) as pool:
        spec = donor.specs()["token_embd.weight"]
        rows = Rows(donor, spec, np.arange(40, dtype=np.int32))
        atoms = rows.read(np.array([7, 21], np.int32))
        targets = np.stack([3 * atoms[0] - 2 * atoms[1], np.zeros_like(atoms[0]), atoms[1]])
        places, parts = pursue(rows, targets.astype(np.float32), 32, pool, lambda _count: None)
        everything = rows.read(np.arange(40, dtype=np.int32)).astype(np.float64)
    for where, much, target in zip(places, parts, targets, strict=True):
        found = (much[where >= 0, None] * everything[where[where >= 0]]).sum(axis=0)
        assert np.abs(found - target).max() < 1e-4
    assert (places[1] == -1).all()
    assert places[2].tolist() == [21] + [-1] * 31
