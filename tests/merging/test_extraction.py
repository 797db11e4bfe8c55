"""An extracted adapter gives the expert back, in both forms, as far as its rank allows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.errors import (
    BudgetError,
    EdgemergeError,
    FormatError,
    MismatchError,
    OutputError,
    RuntimeFailure,
)
from edgemerge.formats import open_model
from edgemerge.merging.extraction import extract
from edgemerge.merging.low_rank import Factors, factorise
from tests.support.adapters import KINDS, noise, write_adapter
from tests.support.architecture_models import ARCHITECTURES
from tests.support.open_gguf import OddModel, load_base
from tests.support.safetensors_files import read_safetensors, write_safetensors
from tests.support.small_models import wide_tensors, write_gguf
from tests.support.sources import read_all
from tests.support.tiny_gguf import write_tiny_gguf

Float32 = NDArray[np.float32]

MIB = 1 << 20


def read(reference: str | Path) -> dict[str, Float32]:
    with closing(open_model(reference)) as source:
        return read_all(source)


def tune(name: str, folder: Path) -> Path:
    """A tiny model of which every tensor was changed."""
    source = ARCHITECTURES / name
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = read_safetensors(source / "model.safetensors")
    changed = {
        n: x + np.float32(0.1) * noise(x.shape, i) for i, (n, x) in enumerate(tensors.items())
    }
    write_safetensors(folder / "model.safetensors", changed)
    return folder


@pytest.mark.parametrize("ending", ["", ".gguf"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3", "mixtral", "qwen3_moe"])
def test_full_rank_gives_the_expert_back(name: str, ending: str, tmp_path: Path) -> None:
    base, expert = ARCHITECTURES / name, tune(name, tmp_path / "expert")
    adapter = tmp_path / f"adapter{ending}"
    report = extract(base, expert, adapter, rank=1000)
    assert report.kept == pytest.approx(1, abs=1e-6)
    assert sum("biases" in note for note in report.notes) == (
        ending == ".gguf" and name in ("llama", "qwen2")
    )
    before, wanted, found = read(base), read(expert), read(f"{base}+{adapter}")
    for tensor, x in wanted.items():
        if tensor.endswith(".bias") and ending:
            assert np.array_equal(found[tensor], before[tensor])
        else:
            assert np.abs(found[tensor] - x).max() < 4e-6, tensor


@pytest.mark.parametrize("ending", ["", ".gguf"])
def test_the_rank_of_the_change_is_enough(ending: str, tmp_path: Path) -> None:
    base = ARCHITECTURES / "llama"
    expert = f"{base}+{write_adapter(KINDS['lora'], tmp_path / 'expert')}"
    report = extract(base, expert, tmp_path / f"adapter{ending}", rank=4)
    assert (report.matrices, report.vectors, report.ranks) == (14, 0, (4, 4))
    before, wanted, found = (
        read(base),
        read(expert),
        read(f"{base}+{tmp_path / f'adapter{ending}'}"),
    )
    lost = sum(float(np.square(found[n] - x).sum()) for n, x in wanted.items())
    change = sum(float(np.square(before[n] - x).sum()) for n, x in wanted.items())
    assert np.sqrt(lost / change) < 1e-5
    assert 1 - report.kept < 1e-6


def spectrum(n_rows: int, n_cols: int, decay: float) -> tuple[Float32, NDArray[np.float64]]:
    rng = np.random.default_rng(3)
    left = np.linalg.qr(rng.standard_normal((n_rows, n_rows)))[0]
    right = np.linalg.qr(rng.standard_normal((n_cols, n_cols)))[0]
    values: NDArray[np.float64] = decay ** np.arange(min(n_rows, n_cols), dtype=np.float64)
    product: Float32 = (left[:, : len(values)] * values @ right[: len(values)]).astype(np.float32)
    return product, values


@pytest.mark.parametrize("shape", [(60, 150), (150, 60)])
def test_a_rank_keeps_what_a_decomposition_keeps(shape: tuple[int, int]) -> None:
    matrix, values = spectrum(*shape, 0.8)
    for rank in (1, 5, 20):
        found = factorise(lambda: iter([(0, matrix)]), shape, rank=rank, energy=None, seed=1)
        assert found is not None
        assert found.rank == rank
        lost = float(np.square(found.left @ found.right - matrix).sum(dtype=np.float64))
        best = float((values[rank:] ** 2).sum())
        assert lost == pytest.approx(best, rel=0.02, abs=1e-9)
        assert found.total - found.kept == pytest.approx(lost, abs=1e-6)


def one_block(matrix: Float32) -> Iterator[tuple[int, Float32]]:
    yield 0, matrix


@pytest.mark.parametrize("narrow", [1, 2, 3, 4, 8, 12])
def test_all_of_a_narrow_matrix_is_kept(narrow: int) -> None:
    """Fault: random signs, as many as the matrix is narrow, lost directions of convolutions of 3 or 4."""
    for seed in range(40):
        tall = noise((50, narrow), seed)
        for matrix in (tall, np.ascontiguousarray(tall.T)):
            shape = matrix.shape[0], matrix.shape[1]
            blocks = partial(one_block, matrix)
            found = factorise(blocks, shape, rank=narrow, energy=None, seed=seed)
            assert found is not None
            assert found.rank == narrow
            assert np.abs(found.left @ found.right - matrix).max() < 1e-5
            assert found.kept == pytest.approx(found.total)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_row_whose_signs_cancel_is_kept(sign: int) -> None:
    """Fault: the row times one vector of signs was 0, and what followed ended in a traceback."""
    row = np.array([[0.25, sign * 0.25]], np.float32)
    for seed in range(8):
        found = factorise(partial(one_block, row), (1, 2), rank=1, energy=None, seed=seed)
        assert found is not None
        assert np.allclose(found.left @ found.right, row)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 0.99999, 1.0])
def test_the_energy_chooses_the_smallest_rank(energy: float) -> None:
    matrix, values = spectrum(80, 100, 0.9)
    sums = np.cumsum(values**2) / np.sum(values**2)
    needed = int(np.searchsorted(sums, energy)) + 1
    found = factorise(lambda: iter([(0, matrix)]), (80, 100), rank=None, energy=energy, seed=1)
    assert found is not None
    assert found.kept >= min(energy, 1 - 1e-6) * found.total
    if energy < 1:
        assert found.rank in (needed, needed + 1)


@pytest.mark.parametrize("size", [1e30, 1e36, 1e38, np.inf])
def test_numbers_near_the_end_of_float32(size: float) -> None:
    """Fault: what overflowed in a product gave NumPy's LinAlgError."""
    matrix = spectrum(80, 100, 0.9)[0] * np.float32(size)

    def find() -> Factors | None:
        blocks = [(0, matrix)]
        return factorise(lambda: iter(blocks), (80, 100), rank=80, energy=None, seed=1)

    if size > 1e36:
        with pytest.raises(OverflowError):
            find()
        return
    found = find()
    assert found is not None
    assert found.kept == pytest.approx(found.total)
    assert np.isfinite(found.left @ found.right).all()


def test_a_change_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Fault: a traceback named neither the model nor the tensor."""
    base, name = wide_tensors(0), "blk.0.attn_q.weight"
    write_gguf(tmp_path / "base.gguf", {**base, name: np.full_like(base[name], -3e38)})
    write_gguf(tmp_path / "expert.gguf", {**base, name: np.full_like(base[name], 3e38)})
    with pytest.raises(
        FormatError, match=r"expert\.gguf: tensor 'blk\.0\.attn_q\.weight': is so far"
    ):
        extract(tmp_path / "base.gguf", tmp_path / "expert.gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@settings(max_examples=5, deadline=None)
@given(threads=st.integers(1, 3), memory=st.integers(140, 2000), rank=st.integers(1, 300))
def test_the_same_bytes_for_every_budget_and_thread_count(
    tmp_path_factory: pytest.TempPathFactory, threads: int, memory: int, rank: int
) -> None:
    folder = tmp_path_factory.mktemp("same")
    base = write_gguf(folder / "base.gguf", wide_tensors(0))
    expert = write_gguf(folder / "expert.gguf", wide_tensors(1, wide_tensors(0)))
    first, second = folder / "first.gguf", folder / "second.gguf"
    extract(base, expert, first, rank=rank)
    with pytest.raises(BudgetError) as caught:
        extract(base, expert, second, rank=rank, memory=64 * MIB)
    least = caught.value.needed + 8 * MIB
    extract(base, expert, second, rank=rank, threads=threads, memory=max(memory * MIB, least))
    assert first.read_bytes() == second.read_bytes()


def test_llama_cpp_runs_a_gguf_adapter(tmp_path: Path) -> None:
    runtime = pytest.importorskip("edgemerge.runtime.llama")
    base, expert = (
        write_tiny_gguf(tmp_path / "base.gguf"),
        write_tiny_gguf(tmp_path / "expert.gguf"),
    )
    for i, tensor in enumerate(gguf.GGUFReader(expert, "r+").tensors):
        if not tensor.name.endswith("_norm.weight"):
            tensor.data[:] += np.float32(0.2) * noise(tensor.data.shape, i)
            tensor.data.flush()
    extract(base, expert, tmp_path / "adapter.gguf", rank=1000)

    def logits(model: Path, *loras: object) -> Float32:
        with runtime.Model(model, loras=loras) as loaded:
            tokens = loaded.bos + loaded.tokenize("the answer")
            wanted = [False] * (len(tokens) - 1) + [True]
            with loaded.context(64, n_batch=64, exact=True) as context:
                decoded: Float32 = context.decode(tokens, wanted)[0].copy()
                return decoded

    adapted = logits(base, runtime.Lora(tmp_path / "adapter.gguf"))
    np.testing.assert_allclose(adapted, logits(expert), atol=1e-3)
    assert np.abs(adapted - logits(base)).max() > 0.05


@pytest.mark.parametrize("ending", ["", ".gguf"])
@pytest.mark.parametrize("owner", ["base", "expert"])
def test_one_may_have_a_head_of_its_own(owner: str, ending: str, tmp_path: Path) -> None:
    """Fault: where the base has it, the change of the head was left out, and of what is kept too."""
    base = wide_tensors(0)
    tensors, paths = {"base": base, "expert": wide_tensors(1, base)}, {}
    for name, found in tensors.items():
        if name != owner:
            del found["output.weight"]
        paths[name] = write_gguf(tmp_path / f"{name}.gguf", found)
    report = extract(paths["base"], paths["expert"], tmp_path / f"adapter{ending}", rank=1000)
    found, expert = read(f"{paths['base']}+{tmp_path / f'adapter{ending}'}"), read(paths["expert"])
    head = expert.get("output.weight", expert["token_embd.weight"])
    assert np.abs(found["output.weight"] - head).max() < 1e-4
    assert report.kept > 0.999
    is_told = any("has a head of its own, and the base has not" in n for n in report.notes)
    assert is_told == (owner == "expert" and ending == ".gguf")


def test_llama_cpp_adds_no_head(tmp_path: Path) -> None:
    """What the note says of a head of the expert's own."""
    runtime = pytest.importorskip("edgemerge.runtime.llama")
    base = load_base(write_tiny_gguf(tmp_path / "tiny.gguf"))
    base.tensors.pop("output.weight", None)
    expert = OddModel(base.metadata, dict(base.tensors))
    shape, dtype, raw = base.tensors["token_embd.weight"]
    expert.tensors["output.weight"] = shape, dtype, (np.frombuffer(raw, "<f4") * 2).tobytes()
    paths = [base.write(tmp_path / "base.gguf"), expert.write(tmp_path / "expert.gguf")]
    report = extract(paths[0], paths[1], tmp_path / "adapter.gguf", rank=1000)
    assert any("cannot add that with --lora" in note for note in report.notes)
    with pytest.raises(RuntimeFailure, match=r"llama\.cpp cannot add this LoRA adapter"):
        runtime.Model(paths[0], loras=[runtime.Lora(tmp_path / "adapter.gguf")])


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    base, expert = ARCHITECTURES / "qwen2", tune("qwen2", tmp_path / "expert")
    sizes = [
        extract(base, expert, tmp_path / f"{dtype}.gguf", rank=1000, dtype=dtype).out_bytes
        for dtype in ("F32", "F16")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    wanted, found = read(expert), read(f"{base}+{tmp_path / 'F16.gguf'}")
    assert np.abs(found["blk.0.attn_q.weight"] - wanted["blk.0.attn_q.weight"]).max() < 2e-4


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    done = CliRunner().invoke(make_app(["extract"]), ["extract", *arguments])
    return done.output if done.exit_code == 0 else f"{done.exit_code}: {done.output}{done.stderr}"


def test_the_command_says_what_it_kept(tmp_path: Path) -> None:
    base, expert = ARCHITECTURES / "qwen2", tune("qwen2", tmp_path / "expert")
    said = run(str(base), str(expert), "-o", str(tmp_path / "out"), "--rank", "8")
    assert "15 matrices of rank 8, and 11 whole vectors" in said
    again = run(str(base), str(expert), "-o", str(tmp_path / "out"), "--rank", "8", "--json")
    assert "exists already; choose another name or give --force" in again
    words = ("--energy", "0.5", "--json", "--force")
    found = json.loads(run(str(base), str(expert), "-o", str(tmp_path / "out"), *words))
    assert found["kept"] >= 0.5
    assert found["ranks"][0] < found["ranks"][1]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == found["ranks"][1]
    assert config["base_model_name_or_path"] == "qwen2"


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    base = str(ARCHITECTURES / "qwen2")
    assert run(base, base, "-o", str(tmp_path / "x"), "--energy", "1.5").startswith("2: ")
    assert run(base, base, "-o", str(tmp_path / "x"), "--type", "Q8_0").startswith("2: ")
    assert "nothing to extract" in run(base, base, "-o", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    other = str(ARCHITECTURES / "llama")
    cases: list[tuple[type[EdgemergeError], str, str, str, int]] = [
        (MismatchError, base, other, "x", 512),
        (BudgetError, base, str(tune("qwen2", tmp_path / "expert")), "x", 70),
        (OutputError, base, other, "gone/x", 512),
        (OutputError, base, other, "gone/x.gguf", 512),
        (FormatError, str(tmp_path), base, "x", 512),
    ]
    for kind, left, right, name, memory in cases:
        with pytest.raises(kind):
            extract(left, right, tmp_path / name, memory=memory * MIB)
        assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        extract(base, other, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("expert", "file")] == []
