"""Against llama-perplexity's own loop, read off tools/perplexity/perplexity.cpp."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.runtime.evaluation import perplexity as module
from edgemerge.runtime.evaluation.likelihood import NoNumbers
from edgemerge.runtime.evaluation.paired import differ_in_perplexity
from edgemerge.runtime.evaluation.perplexity import Chunk, cut_text, perplexity_of, score_chunks
from edgemerge.runtime.llama import Model

pytestmark = pytest.mark.llama

N_CTX = 64
TEXT = "the answer is in the end of it, or so. who has the other one?\n" * 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def plain_perplexity(path: Path, text: bytes) -> tuple[float, float]:
    """Value and error as llama-perplexity prints them, through llama-cpp-python's own class."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=N_CTX, logits_all=True, verbose=False, n_threads=1)
    try:
        tokens = llama.tokenize(text.removesuffix(b"\n"), add_bos=True)
        nll = nll2 = 0.0
        count = 0
        for start in range(0, len(tokens) // N_CTX * N_CTX, N_CTX):
            chunk = [llama.token_bos(), *tokens[start + 1 : start + N_CTX]]
            llama.reset()
            llama.eval(chunk)
            for i in range(N_CTX // 2, N_CTX - 1):
                logits = np.array(llama.scores[i], dtype=np.float64)
                value = float(np.log(np.exp(logits).sum()) - logits[chunk[i + 1]])
                nll, nll2, count = nll + value, nll2 + value * value, count + 1
    finally:
        llama.close()
    nll, nll2 = nll / count, nll2 / count
    return math.exp(nll), math.exp(nll) * math.sqrt((nll2 - nll * nll) / (count - 1))


def test_it_is_llama_perplexitys(tiny_gguf: Path, text: Path) -> None:
    with Model(tiny_gguf) as model:
        chunks = cut_text(model, text, N_CTX)
        assert [len(chunk) for chunk in chunks] == [N_CTX] * len(chunks)
        scored = dict(score_chunks(model, chunks))
        found = perplexity_of(scored.values())
        assert dict(score_chunks(model, chunks, skip={0, 2})) == {
            i: chunk for i, chunk in scored.items() if i not in (0, 2)
        }
    value, error = plain_perplexity(tiny_gguf, TEXT.encode())
    assert found.value == pytest.approx(value, rel=1e-3)  # attention in half precision
    assert found.stderr == pytest.approx(error, rel=1e-3)
    assert found.n_tokens == len(chunks) * (N_CTX // 2 - 1)
    assert found.n_chunks == len(chunks) > 3


def test_even_tokens_have_no_error() -> None:
    assert perplexity_of([Chunk(20.0, 40.0, 10)]).value == pytest.approx(math.exp(2.0))
    assert perplexity_of([Chunk(20.0, 40.0, 10)]).stderr == 0.0


@pytest.mark.parametrize(("loss", "is_told"), [(690.0, True), (691.0, False), (1e30, False)])
def test_a_perplexity_beyond_all_numbers_is_refused(
    loss: float, is_told: bool, tiny_gguf: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "log_likelihoods", lambda _logits, _rows, after: np.full(len(after), -loss)
    )
    with Model(tiny_gguf) as model:
        scores = score_chunks(model, cut_text(model, text, N_CTX))
        if is_told:
            found = [chunk for _, chunk in scores]
            assert perplexity_of(found).value == pytest.approx(math.exp(loss))
            start = [replace(chunk, nll=0.0) for chunk in found]
            assert math.isfinite(differ_in_perplexity(start, found).high)
        else:
            with pytest.raises(NoNumbers, match=r"tiny.* is above 1e\+300, so its weights are"):
                next(scores)


def test_the_text_is_taken_as_it_is(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with Model(tiny_gguf) as model:
        path.write_bytes(TEXT.replace("\n", "\r\n").encode())
        (first, *_) = cut_text(model, path, N_CTX)
        tokens = model.tokenize(TEXT.replace("\n", "\r\n"))
        assert first == [*model.bos, *tokens[: N_CTX - 1]]


def test_texts_that_do_not_do_are_refused(tiny_gguf: Path, text: Path, tmp_path: Path) -> None:
    with Model(tiny_gguf) as model:
        with pytest.raises(
            FormatError, match=r"chunks of 200 needs 400: give a longer text, or -c"
        ):
            cut_text(model, text, 200)
        with pytest.raises(RuntimeFailure, match="its context is 256 tokens, not 512"):
            cut_text(model, text, 512)
        binary = tmp_path / "binary"
        binary.write_bytes(b"\xff\xfe")
        with pytest.raises(FormatError, match="not UTF-8"):
            cut_text(model, binary, 512)  # before what the context lacks
        with pytest.raises(FormatError, match="is a folder; give a text file"):
            cut_text(model, tmp_path, N_CTX)
