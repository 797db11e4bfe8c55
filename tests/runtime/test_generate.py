from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.engine.drafts import MOST, Drafts
from edgemerge.runtime.engine.messages import Sampling
from edgemerge.runtime.generate import Session, check_prompt, read_prompt
from edgemerge.runtime.llama import Model
from tests.support.open_gguf import load_base
from tests.support.tiny_gguf import CONTEXT

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with Model(tiny_gguf) as loaded:
        yield loaded


def complete(
    model: Model, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """Yield what follows a prompt, in a context with just enough room."""
    tokens = read_prompt(model, prompt)
    n_ctx = min(len(tokens) + max(1, max_tokens), model.n_ctx_train)
    with Session(model, n_ctx, Sampling(temperature=temperature, seed=seed)) as session:
        yield from session.generate(tokens, max_tokens)


def test_greedy_text_is_the_likeliest_token_each_time(tiny_gguf: Path, model: Model) -> None:
    from llama_cpp import Llama

    llama = Llama(str(tiny_gguf), n_ctx=CONTEXT, verbose=False, n_threads=1)
    try:
        tokens: list[int] = []
        for token in llama.generate(llama.tokenize(b"the answer"), temp=0.0, repeat_penalty=1.0):
            if token == llama.token_eos() or len(tokens) == 12:
                break
            tokens.append(token)
        expected = b"".join(model.piece(token) for token in tokens)
    finally:
        llama.close()
    assert "".join(complete(model, "the answer", 12)) == expected.decode(errors="replace")


def test_the_seed_decides_what_is_drawn(model: Model) -> None:
    def draw(seed: int) -> str:
        return "".join(complete(model, "the answer", 16, temperature=1.0, seed=seed))

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_generation_stops_where_it_must(model: Model) -> None:
    assert list(complete(model, "the answer", 0)) == []
    n_prompt = len(model.bos + model.tokenize("x" * (CONTEXT - 20)))
    text = "".join(complete(model, "x" * (CONTEXT - 20), 1000))
    # each token is at most one of the vocabulary's words, "▁answer"
    assert len(text) <= (CONTEXT - n_prompt) * len(" answer")


def test_a_long_prompt_is_fed_in_parts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "the answer of the answer " * 4
    whole = "".join(complete(model, prompt, 8))
    monkeypatch.setattr("edgemerge.runtime.generate._BATCH", 7)
    assert "".join(complete(model, prompt, 8)) == whole


def test_guesses_change_nothing_and_count_as_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = tuple((token, 12.0) for token in (260, 270, 280))  # so that it repeats itself soon
    tokens = read_prompt(model, "the answer of the answer ")

    def draw() -> tuple[str, int, int]:
        sampling = Sampling(temperature=0.0, bias=bias)
        with Session(model, CONTEXT, sampling) as session:
            text = "".join(session.generate(tokens, 60))
            return text, session.figures.n_generated, session.figures.n_steps

    guessed: list[int] = []
    note = Drafts.note

    def spy(self: Drafts, n_guessed: int, n_right: int, n_tokens: int) -> None:
        guessed.append(n_guessed)
        note(self, n_guessed, n_right, n_tokens)

    monkeypatch.setattr(Drafts, "note", spy)
    with_guesses = draw()
    assert max(guessed) == MOST
    monkeypatch.setattr(Drafts, "guess", lambda *_: [])
    assert with_guesses == draw()


def test_a_prompt_that_cannot_work_is_refused(model: Model) -> None:
    with pytest.raises(RuntimeFailure, match=f"context is {CONTEXT}: shorten"):
        check_prompt(read_prompt(model, "x" * CONTEXT), CONTEXT)


def test_a_beginning_of_sequence_is_not_doubled(model: Model) -> None:
    tokens = read_prompt(model, "the answer")
    assert tokens == [*model.bos, *model.tokenize("the answer")]
    assert tokens[0] == 1
    assert read_prompt(model, "<s>the answer")[:2] != [1, 1]
    assert read_prompt(model, "<s>")[:2] == [1]


def test_tokens_spell_the_text(model: Model) -> None:
    text = "the answer, Grüße 日本"
    tokens = model.tokenize(text)
    assert b"".join(map(model.piece, tokens)).decode() == f" {text}"  # SentencePiece's space
    assert model.tokenize("</s>", special=True)[-1] == 2
    assert model.tokenize("</s>")[-1] != 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"none\.gguf: there is no such file"):
        Model(tmp_path / "none.gguf")


def test_a_refused_file_says_why(
    tmp_path: Path, tiny_gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_base(tiny_gguf)
    model.set("tokenizer.ggml.model", "made-up", "str")
    path = model.write(tmp_path / "bad.gguf")
    with pytest.raises(
        RuntimeFailure, match=r"bad\.gguf: .* cannot load .*unknown token"
    ) as caught:
        Model(path)
    assert str(caught.value).endswith("): get or make the file again, or update llama-cpp-python")
    assert caught.value.detail == ""  # all else in the log says only that it failed
    assert capfd.readouterr() == ("", "")


def test_without_the_extra_the_sentence_says_what_to_install(tiny_gguf: Path) -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from edgemerge.runtime.llama import Model\n"
        f"Model({str(tiny_gguf)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeFailure: " in result.stderr
    assert "pip install 'edgemerge[run]'" in result.stderr


def test_nothing_is_printed(tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Model(tiny_gguf) as model:
        list(complete(model, "the", 2))
    assert capfd.readouterr() == ("", "")
