"""Comparisons give NumPy's figures, the same for every budget and thread count, and say what they mean."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from numpy.typing import NDArray
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.errors import BudgetError, FormatError, MismatchError
from edgemerge.merging.comparison import Comparison, compare
from tests.support.architecture_models import ARCHITECTURES
from tests.support.safetensors_files import read_safetensors, write_safetensors
from tests.support.small_models import wide_tensors, write_gguf
from tests.support.tiny_gguf import write_tiny_gguf

Float32 = NDArray[np.float32]
Tensors = Mapping[str, Float32]
MIB = 1 << 20


def tune(base: Tensors, seed: int, size: float) -> dict[str, Float32]:
    """Half of the weights change, by noise of a size."""
    rng = np.random.default_rng(seed)
    return {
        name: x
        + np.float32(size)
        * (rng.standard_normal(x.shape) * rng.integers(0, 2, x.shape)).astype(np.float32)
        for name, x in base.items()
    }


def verdicts(found: Comparison) -> list[str]:
    return [verdict.name for verdict in found.verdicts]


def cosine(a: Float32, b: Float32) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def stable_rank(x: Float32) -> float:
    squares = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    return float(squares.sum() / squares[0])


BASE = wide_tensors(0)
FIRST, SECOND = tune(BASE, 1, 0.1), tune(BASE, 2, 0.2)


@pytest.mark.parametrize("has_base", [False, True])
def test_figures_are_numpys(has_base: bool, tmp_path: Path) -> None:
    a, b = write_gguf(tmp_path / "a.gguf", FIRST), write_gguf(tmp_path / "b.gguf", SECOND)
    base = write_gguf(tmp_path / "base.gguf", BASE) if has_base else None
    found = compare(a, b, base=base)
    assert {one.name for one in found.tensors} == BASE.keys()
    for one in found.tensors:
        x, y, z = FIRST[one.name], SECOND[one.name], BASE[one.name]
        left, right = (x - z, y - z) if has_base else (x, y)
        both = (left != 0) & (right != 0)
        same = np.sign(left[both]) == np.sign(right[both])
        ratio = np.linalg.norm(right.astype(float)) / np.linalg.norm(left.astype(float))
        assert one.cosine == pytest.approx(cosine(left, right), abs=1e-12)
        assert one.norm_ratio == pytest.approx(ratio, rel=1e-12)
        assert one.sign_agreement == pytest.approx(same.mean())
        alike = (x == z, y == z) if has_base else (x == y,)
        assert one.unchanged == tuple(float(part.mean()) for part in alike)
        changes = (x - z, y - z) if has_base else (y - x,)
        for rank, change in zip(one.ranks, changes, strict=True):
            if x.ndim == 1:
                assert rank is None
            else:  # an estimate that is no lower
                assert 1 - 1e-5 <= (rank or 0.0) / stable_rank(change) < 1.3


def test_a_change_of_low_rank_has_its_rank(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    factors = rng.standard_normal((48, 3)), rng.standard_normal((3, 256))
    change = (factors[0] @ factors[1]).astype(np.float32)
    tuned = dict(BASE) | {"blk.0.attn_q.weight": BASE["blk.0.attn_q.weight"] + change}
    a, b = write_gguf(tmp_path / "a.gguf", BASE), write_gguf(tmp_path / "b.gguf", tuned)
    found = {one.name: one for one in compare(a, b).tensors}
    (rank,) = found["blk.0.attn_q.weight"].ranks
    assert rank == pytest.approx(stable_rank(change), rel=1e-4)
    assert found["blk.0.attn_k.weight"].ranks == (None,)
    assert found["blk.0.attn_k.weight"].unchanged == (1.0,)


def stack(tensors: Tensors, seed: int) -> dict[str, Float32]:
    noise = np.random.default_rng(seed).standard_normal((4, 24, 256)).astype(np.float32)
    return {**tensors, "blk.0.ffn_up_exps.weight": noise}


def test_a_stack_of_experts_is_one_tensor(tmp_path: Path) -> None:
    first, second = stack(BASE, 1), stack(BASE, 2)
    a, b = write_gguf(tmp_path / "a.gguf", first), write_gguf(tmp_path / "b.gguf", second)
    found = {one.name: one for one in compare(a, b).tensors}["blk.0.ffn_up_exps.weight"]
    x, y = first[found.name], second[found.name]
    assert found.cosine == pytest.approx(cosine(x, y), abs=1e-12)
    assert found.sums.n == 4 * 24 * 256
    ranks = [stable_rank(left) for left in y - x]
    assert found.ranks[0] == pytest.approx(float(np.mean(ranks)), rel=0.2)


@settings(max_examples=5, deadline=None)
@given(threads=st.integers(1, 3), memory=st.integers(110, 2000), has_base=st.booleans())
def test_figures_are_the_same_for_every_budget_and_thread_count(
    tmp_path_factory: pytest.TempPathFactory, threads: int, memory: int, has_base: bool
) -> None:
    folder = tmp_path_factory.mktemp("same")
    a, b = write_gguf(folder / "a.gguf", FIRST), write_gguf(folder / "b.gguf", SECOND)
    base = write_gguf(folder / "base.gguf", BASE) if has_base else None
    with pytest.raises(BudgetError, match="this comparison") as caught:
        compare(a, b, base=base, memory=64 * MIB)
    least = caught.value.needed + 8 * MIB
    found = [
        compare(a, b, base=base),
        compare(a, b, base=base, threads=threads, memory=max(memory * MIB, least)),
    ]
    figures = [
        [(one.sums.grams.tolist(), one.sums.same_sign, one.ranks) for one in each.tensors]
        for each in found
    ]
    assert figures[0] == figures[1]


def test_the_smallest_budget_holds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (16000, 1024)
    tensors = {"token_embd.weight": rng.standard_normal(shape, np.float32)}
    a = write_gguf(tmp_path / "a.gguf", tensors)
    tensors["token_embd.weight"] += np.float32(0.1) * rng.standard_normal(shape, np.float32)
    b = write_gguf(tmp_path / "b.gguf", tensors)
    command = [sys.executable, "-m", "edgemerge", "compare", str(a), str(b)]
    small = subprocess.run(
        [*command, "--memory", "70MiB"], capture_output=True, text=True, check=False
    )
    (least,) = re.findall(r"--memory (\d+)MiB$", small.stderr.strip())
    done = subprocess.run(
        [*command, "--memory", f"{least}MiB", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["peak_rss_bytes"] <= int(least) * MIB


# -- verdicts --------------------------------------------------------------------------------------

OTHER = wide_tensors(9)
OPPOSITE = {name: BASE[name] - (x - BASE[name]) for name, x in FIRST.items()}
LOUD = tune(BASE, 3, 0.7)
QUIET = tune(BASE, 2, 0.007)
SHUFFLED = dict(FIRST) | {"blk.0.attn_q.weight": FIRST["blk.0.attn_q.weight"][::-1].copy()}


@pytest.mark.parametrize(
    ("a", "b", "base", "names", "words"),
    [
        (FIRST, FIRST, None, ["equal"], "a.gguf and b.gguf have the same weights"),
        (FIRST, SECOND, None, ["near"], "as fine-tunes of one base are"),
        (FIRST, OTHER, None, ["other_base"], "b.gguf has little in common with a.gguf"),
        (FIRST, SHUFFLED, None, ["far_tensors", "near"], "1 of 8 matrices of b.gguf"),
        (
            FIRST,
            {name: np.float32(100) * x for name, x in FIRST.items()},
            None,
            ["louder", "near"],
            "b.gguf is 100 times as loud as a.gguf",
        ),
        (FIRST, SECOND, BASE, ["apart"], "the changes of a.gguf and b.gguf have little in common"),
        (FIRST, FIRST, BASE, ["equal"], "have the same weights"),
        (FIRST, BASE, BASE, ["unchanged"], "b.gguf has the weights of base.gguf"),
        (FIRST, OPPOSITE, BASE, ["opposed"], "a mean cancels a part of both"),
        (FIRST, tune(FIRST, 4, 0.01), BASE, ["alike"], "a merge gains little"),
        (FIRST, SHUFFLED, BASE, ["far_tensors", "apart"], "edgemerge align tells"),
        (LOUD, QUIET, BASE, ["louder", "apart"], "times as loud as b.gguf (norm of its change"),
        (
            FIRST,
            OTHER,
            BASE,
            ["other_base"],
            "b.gguf has little in common with base.gguf (cosine of the weights -0.01)",
        ),
    ],
)
def test_a_verdict_says_what_it_means(
    a: Tensors, b: Tensors, base: Tensors | None, names: list[str], words: str, tmp_path: Path
) -> None:
    paths = [write_gguf(tmp_path / "a.gguf", a), write_gguf(tmp_path / "b.gguf", b)]
    root = None if base is None else write_gguf(tmp_path / "base.gguf", base)
    found = compare(*paths, base=root)
    assert verdicts(found) == names
    assert words in found.verdicts[0].sentence


def respell(path: Path, n_tokens: int) -> Path:
    """Change the text of so many tokens, in place."""
    field = gguf.GGUFReader(path, "r+").fields["tokenizer.ggml.tokens"]
    for i in field.data[100 : 100 + n_tokens]:
        field.parts[i][:] = ord("~")
    return path


@pytest.mark.parametrize(("n_tokens", "how"), [(2, "differ"), (20, "have little in common")])
def test_tokenizers_that_differ_are_told(n_tokens: int, how: str, tmp_path: Path) -> None:
    a = write_tiny_gguf(tmp_path / "a.gguf")
    b = respell(write_tiny_gguf(tmp_path / "b.gguf"), n_tokens)
    found = compare(a, b)
    assert verdicts(found) == ["tokenizers", "equal"]
    assert found.verdicts[0].sentence == f"the tokenizers of a.gguf and b.gguf {how}"


def test_rows_that_not_all_have_are_told_once(tmp_path: Path) -> None:
    base, longer = ARCHITECTURES / "llama", tmp_path / "longer"
    shutil.copytree(base, longer)
    config = json.loads((base / "config.json").read_text())
    config["vocab_size"] += 4
    (longer / "config.json").write_text(json.dumps(config))
    tensors = read_safetensors(base / "model.safetensors")
    rows = {name: x for name, x in tensors.items() if "embed_tokens" in name or "lm_head" in name}
    more = {name: np.concatenate([x, x[:4]]) for name, x in rows.items()}
    write_safetensors(longer / "model.safetensors", tensors | more)
    notes = [note for note in compare(base, longer, base=base).notes if "token_embd" in note]
    assert notes == [
        "token_embd.weight is left out, as the models have different numbers of tokens"
    ]


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(make_app(["compare"]), ["compare", *map(str, arguments)])
    return done.output if done.exit_code == 0 else f"{done.exit_code}: {done.output}"


def test_the_command_prints_a_verdict_and_a_table(models_dir: Path, tmp_path: Path) -> None:
    a, b, base = (models_dir / name for name in ("expert-a", "expert-b", "base"))
    picture = tmp_path / "heat.png"
    lines = run(a, b, "--base", base, "--plot", picture).splitlines()
    assert lines[0].startswith("the changes of expert-a and expert-b have a part in common")
    assert lines[1] == "A is expert-a, B is expert-b, the base is base; of what they changed of it:"
    assert [line.split()[0] for line in lines[3:5]] == ["token_embd.weight", "attn_norm.weight"]
    assert lines[4].split()[1:4] == ["0", "to", "3"]
    assert len(lines) == 3 + 11 + 1
    image = imread(picture)
    assert image.shape[1] > image.shape[0] > 500
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    assert "exists already" in run(a, b, "--plot", picture)


def test_json_has_all_tensors(models_dir: Path) -> None:
    a, b = models_dir / "base", models_dir / "expert-b-permuted"
    found: dict[str, Any] = json.loads(run(a, b, "--json"))
    assert (found["verdict"], found["base"], found["notes"]) == ("far_tensors", None, [])
    assert [one["name"] for one in found["verdicts"]] == ["far_tensors", "near"]
    assert len(found["tensors"]) == 38
    assert found["tensors"][0].keys() == {
        *("name", "shape", "elements", "cosine", "norms", "norm_ratio", "sign_agreement"),
        *("unchanged", "effective_rank"),
    }


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = write_gguf(tmp_path / "a.gguf", BASE)
    shorter = dict(BASE) | {"blk.0.attn_q.weight": BASE["blk.0.attn_q.weight"][:32]}
    with pytest.raises(MismatchError, match=r"attn_q.*\[48, 256\].*\[32, 256\]"):
        compare(a, write_gguf(tmp_path / "b.gguf", shorter))
    broken = dict(BASE) | {"blk.0.attn_q.weight": BASE["blk.0.attn_q.weight"] * np.float32(np.inf)}
    with pytest.raises(FormatError, match="NaN or infinity"):
        compare(a, write_gguf(tmp_path / "c.gguf", broken))
    assert run(a, a, "--plot", tmp_path / "x.jpg").startswith("2: ")
