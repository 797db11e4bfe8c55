"""Every kind of GGUF merges: hybrids, mixtures of experts, the text part of a vision model, encoders.

The models have the names, shapes and settings that llama.cpp's converter writes (tests/support/odd_kinds.py).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.llama_rules import find_violations
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.llama_quantize import Quantiser
from tests.support.odd_kinds import headers, write_kind
from tests.twins.methods import merge_tensor

KINDS = tuple(headers())
DECODERS = tuple(kind for kind in KINDS if kind != "bert")
STATEFUL = ("granite hybrid", "falcon-h1", "mamba", "lfm2 moe")
METHODS = {"task_arithmetic": {"lambda": 0.7}, "ties": {"density": 0.5}}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: write_kind(kind, folder / kind) for kind in KINDS}


def merged(models: list[Path], target: Path, method: str, out_type: str) -> Path:
    base, *experts = models
    recipe = make_recipe(
        method,
        [(str(path), None) for path in experts],
        base=str(base),
        parameters=dict(METHODS[method]),
        out_type=out_type,
    )
    assert merge(recipe, target, threads=1).notes == ()
    model = GgufModel(target)
    assert find_violations(model.metadata(), model.specs(), model.architecture) == []
    model.close()
    return target


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_numpys(
    kind: str, method: str, kinds: dict[str, list[Path]], tmp_path: Path
) -> None:
    base, *experts = (read(path) for path in kinds[kind])
    found = read(merged(kinds[kind], tmp_path / "out.gguf", method, "F32"))
    assert list(found) == list(headers()[kind]["tensors"])
    settings = {"weight": 1.0, "density": METHODS[method].get("density", 1.0)}
    for name, values in found.items():
        wanted = merge_tensor(
            method,
            base[name],
            [(expert[name], settings) for expert in experts],
            {"lambda": METHODS[method].get("lambda", 1.0)},
        )
        sure = True if wanted.doubtful is None else ~wanted.doubtful
        scale = np.abs(wanted.values).max()
        np.testing.assert_allclose(
            np.where(sure, values, 0), np.where(sure, wanted.values, 0), atol=1e-6 * scale
        )


@pytest.mark.parametrize("kind", KINDS)
def test_f16_has_the_types_of_the_converter(
    kind: str, kinds: dict[str, list[Path]], tmp_path: Path
) -> None:
    found = merged(kinds[kind], tmp_path / "out.gguf", "ties", "F16")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(found).tensors}
    assert types == {name: dtype for name, (dtype, *_) in headers()[kind]["tensors"].items()}


@pytest.mark.llama
@pytest.mark.parametrize("out_type", ["Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_merge_has_the_types_of_llama_quantize(
    kind: str, out_type: str, kinds: dict[str, list[Path]], tmp_path: Path
) -> None:
    llama = pytest.importorskip("llama_cpp")
    found = merged(kinds[kind], tmp_path / "merged.gguf", "task_arithmetic", out_type)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(found).tensors}
    assert types == Quantiser(llama, tmp_path).run(kinds[kind][0], out_type)
    assert out_type == "Q8_0" or kind != "granite hybrid" or "Q4_K" in types.values()


@pytest.mark.llama
@pytest.mark.parametrize("out_type", ["F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_merged_decoder_writes(
    kind: str, out_type: str, kinds: dict[str, list[Path]], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from edgemerge.runtime.engine.messages import Sampling
    from edgemerge.runtime.generate import End, Session, read_prompt
    from edgemerge.runtime.llama import Model

    path = merged(kinds[kind], tmp_path / "out.gguf", "ties", out_type)
    with (
        Model(path, n_threads=1) as model,
        Session(model, 64, Sampling(temperature=0.0)) as session,
    ):
        list(session.generate(read_prompt(model, "the answer of"), 4))
        assert session.figures.end in (End.LENGTH, End.MODEL, End.LOOP)
        assert model.keeps_state == (kind in STATEFUL)


@pytest.mark.llama
@pytest.mark.parametrize("kind", [*STATEFUL, "qwen2 moe"])
def test_options_score_as_each_by_itself(kind: str, kinds: dict[str, list[Path]]) -> None:
    """A running state cannot be shared or cut back: eval said "this model's memory cannot be cut back"."""
    pytest.importorskip("llama_cpp")
    from edgemerge.runtime.evaluation.likelihood import log_likelihoods, option_likelihoods
    from edgemerge.runtime.evaluation.questions import Question
    from edgemerge.runtime.llama import Model

    questions = [
        Question("the answer of the fox", (" lies in", " a", " fences"), 0),
        Question("the answer is", (" here", " it"), 1),
    ]
    with Model(kinds[kind][0], n_threads=1) as model:
        for question, found in zip(questions, option_likelihoods(model, questions), strict=True):
            prompt = model.tokenize(question.prompt)
            for option, total in zip(question.options, found.totals, strict=True):
                ending = model.tokenize(f"{question.prompt} {option}")[len(prompt) :]
                tokens = [*model.bos, *prompt, *ending[:-1]]
                n = len(tokens)
                wanted = [i >= n - len(ending) for i in range(n)]
                with model.context(n, n_batch=n, n_outputs=len(ending), exact=True) as context:
                    logits = context.decode(tokens, wanted)
                    alone = log_likelihoods(logits, range(len(ending)), ending).sum()
                assert total == pytest.approx(float(alone), abs=1e-3)


@pytest.mark.llama
@pytest.mark.parametrize("out_type", ["F16", "Q8_0", "Q4_K_M"])
def test_a_merged_encoder_embeds(
    out_type: str, kinds: dict[str, list[Path]], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    wanted = embed(merged(kinds["bert"], tmp_path / "f32.gguf", "ties", "F32"))
    found = embed(merged(kinds["bert"], tmp_path / "out.gguf", "ties", out_type))
    cosine = found @ wanted / (np.linalg.norm(found) * np.linalg.norm(wanted))
    assert cosine > {"F16": 0.9999, "Q8_0": 0.999, "Q4_K_M": 0.95}[out_type]
    other = embed(kinds["bert"][0])
    assert not np.allclose(other, wanted, atol=1e-3)


def embed(path: Path) -> NDArray[np.float32]:
    from edgemerge.runtime.engine.vectors import read_vector
    from tests.support.engines import Engine

    with Engine(path, n_ctx=64) as engine:
        vectors, _ = engine.run(engine.process.embed(["the answer of"]))
    return read_vector(vectors[0])
