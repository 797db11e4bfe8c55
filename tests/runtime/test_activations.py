"""Importances that are measured: against NumPy, against llama-imatrix, and what cannot be measured."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.output.importance_file import Squares
from edgemerge.runtime import ggml_tensors
from edgemerge.runtime.activations import _Collector, measure_importances
from edgemerge.runtime.evaluation.perplexity import cut_text
from edgemerge.runtime.llama import Model
from edgemerge.types import ignore_parts
from tests.support.architecture_models import ARCHITECTURES, convert
from tests.support.tiny_gguf import N_EMBD, N_FF, N_LAYERS

pytestmark = pytest.mark.llama

N_CTX = 64
TEXT = "the answer is in the end of it, or so. who has the other one?\n" * 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def measure(path: Path, text: Path, n_batch: int = N_CTX, **options: bool) -> dict[str, Squares]:
    with Model(path, n_threads=1) as model:
        chunks = cut_text(model, text, N_CTX)
        return measure_importances(
            model, chunks, n_batch=n_batch, progress=ignore_parts(""), **options
        )


def tokens_of(path: Path, text: Path) -> NDArray[np.int64]:
    with Model(path, n_threads=1) as model:
        return np.array(cut_text(model, text, N_CTX)).ravel()


def stored(path: Path) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_the_first_layers_inputs_are_normalised_embeddings(tiny_gguf: Path, text: Path) -> None:
    found = measure(tiny_gguf, text)
    tokens = tokens_of(tiny_gguf, text)
    x = stored(tiny_gguf)["token_embd.weight"][tokens].astype(np.float64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    for part in "qkv":  # whose norm multiplies by 1
        entry = found[f"blk.0.attn_{part}.weight"]
        assert entry.counts.tolist() == [tokens.size]
        assert np.allclose(entry.sums[0], (x**2).sum(axis=0), rtol=1e-4)


# Of llama-imatrix on this model and text, with -c 64 -b 64: some of the sums, 24 apart.
THEIRS = {
    "blk.0.attn_output.weight": [3191.75, 2351, 1600.42],
    "blk.0.attn_q.weight": [847.483, 1008.85, 496.2],
    "blk.0.ffn_down.weight": [4922.96, 981.473, 3127.56, 7561.07, 7313.88],
    "blk.0.ffn_gate.weight": [743.067, 784.117, 452.86],
    "blk.1.attn_output.weight": [2962.75, 3073.37, 1631.22],
    "blk.1.attn_q.weight": [514.588, 393.723, 589.354],
    "blk.1.ffn_down.weight": [5076.63, 7959.35, 5737.27, 10111.3, 7927.37],
    "blk.1.ffn_gate.weight": [531.21, 453.139, 549.495],
}


def test_sums_are_llama_imatrixs(tiny_gguf: Path, text: Path) -> None:
    """Its file has the same bytes where llama.cpp was built alike; other processors round otherwise."""
    found = measure(tiny_gguf, text)
    for name, sums in THEIRS.items():
        assert found[name].sums[0, 5::24][:5].tolist() == pytest.approx(sums, rel=2e-3), name
        assert found[name].counts.tolist() == [640]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_each_expert_is_measured_by_itself(name: str, text: Path, tmp_path: Path) -> None:
    """Experts see what their router sees, and each token goes to two of them."""
    found = measure(convert(ARCHITECTURES / name, tmp_path / "moe.gguf"), text)
    n_tokens = found["blk.0.attn_q.weight"].counts[0]
    for layer in range(2):
        gates = found[f"blk.{layer}.ffn_gate_exps.weight"]
        router = found[f"blk.{layer}.ffn_gate_inp.weight"]
        n_chosen = gates.counts.sum() / n_tokens
        assert n_chosen == 2
        assert np.allclose(gates.sums.sum(axis=0), n_chosen * router.sums[0], rtol=1e-3)
        down = found[f"blk.{layer}.ffn_down_exps.weight"]
        assert down.counts.tolist() == gates.counts.tolist()
        assert ((down.sums.sum(axis=1) > 0) == (down.counts > 0)).all()


def test_every_matrix_of_the_layers_is_measured(tiny_gguf: Path, text: Path) -> None:
    found = measure(tiny_gguf, text)
    columns = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), N_EMBD)
    columns |= {"ffn_gate": N_EMBD, "ffn_up": N_EMBD, "ffn_down": N_FF}
    assert {name: entry.sums.shape for name, entry in found.items()} == {
        f"blk.{layer}.{stem}.weight": (1, n_cols)
        for layer in range(N_LAYERS)
        for stem, n_cols in columns.items()
    }
    with_output = measure(tiny_gguf, text, with_output=True)
    assert with_output.keys() - found.keys() == {"output.weight"}
    assert all(np.array_equal(with_output[name].sums, found[name].sums) for name in found)


def test_smaller_batches_change_the_rounding_only(tiny_gguf: Path, text: Path) -> None:
    whole, parts = measure(tiny_gguf, text), measure(tiny_gguf, text, n_batch=24)
    for name, entry in whole.items():
        assert np.allclose(parts[name].sums, entry.sums, rtol=2e-3), name
        assert parts[name].counts.tolist() == entry.counts.tolist()


def test_a_batch_of_few_tokens_is_not_looked_at(tiny_gguf: Path, text: Path) -> None:
    """As llama-imatrix: what is left of a chunk after whole batches may be too short."""
    whole, parts = measure(tiny_gguf, text), measure(tiny_gguf, text, n_batch=60)
    name = "blk.0.attn_q.weight"
    assert parts[name].counts[0] == whole[name].counts[0] // N_CTX * 60


def test_finding_the_fastest_threads_is_not_measured(
    tiny_gguf: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    fixed = measure(tiny_gguf, text)
    with Model(tiny_gguf) as model:
        chunks = cut_text(model, text, N_CTX)
        found = measure_importances(model, chunks, n_batch=N_CTX, progress=ignore_parts(""))
    assert {n: e.counts.tolist() for n, e in found.items()} == {
        n: e.counts.tolist() for n, e in fixed.items()
    }


def spoil(path: Path, target: Path, name: str) -> Path:
    """Copy a model with NaN in a tensor."""
    reader = gguf.GGUFReader(path)
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == name)
    raw = bytearray(path.read_bytes())
    raw[tensor.data_offset : tensor.data_offset + 4] = np.float32(np.nan).tobytes()
    target.write_bytes(raw)
    return target


def test_a_model_that_computes_nan_is_refused(tiny_gguf: Path, text: Path, tmp_path: Path) -> None:
    path = spoil(tiny_gguf, tmp_path / "nan.gguf", "blk.1.attn_norm.weight")
    with pytest.raises(
        FormatError, match=r"nan\.gguf: tensor 'blk\.1\.attn_[qkv]\.weight': .* NaN"
    ):
        measure(path, text)


@pytest.mark.parametrize("left_out", [("op_params", "flags"), ("view_src",), ("buffer",)])
def test_another_layout_of_tensors_is_refused(
    tiny_gguf: Path, text: Path, monkeypatch: pytest.MonkeyPatch, left_out: tuple[str, ...]
) -> None:
    class Other(ctypes.Structure):
        pass

    fields = {field[0]: field[1] for field in ggml_tensors.Tensor._fields_}
    fields["src"] = ctypes.POINTER(Other) * 10
    Other._fields_ = [(name, kind) for name, kind in fields.items() if name not in left_out]
    monkeypatch.setattr(ggml_tensors, "Tensor", Other)
    with pytest.raises(RuntimeFailure, match=r"install 0\.3\.36 with pip"):
        measure(tiny_gguf, text)


def test_a_stop_is_heard_between_chunks(tiny_gguf: Path, text: Path) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with Model(tiny_gguf, n_threads=1) as model:
        chunks = cut_text(model, text, N_CTX)
        with pytest.raises(KeyboardInterrupt):
            measure_importances(model, chunks, n_batch=N_CTX, progress=stop)
    assert seen == [(i, len(chunks)) for i in range(3)]


def test_an_interrupt_is_heard_by_no_callback_of_llama_cpp(
    tiny_gguf: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the main thread it could be raised where it is printed as a traceback and lost."""
    seen = []

    def interrupt(*_: object) -> bool:
        seen.append(threading.current_thread() is threading.main_thread())
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr(_Collector, "_is_wanted", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_gguf, text)
    assert seen
    assert not any(seen)
