from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.evaluation import likelihood as module
from edgemerge.runtime.evaluation.likelihood import option_likelihoods, score_questions
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.llama import Model
from tests.support.tiny_gguf import CONTEXT

pytestmark = pytest.mark.llama


def asked(question: str, options: tuple[str, ...], answer: int = 0) -> Question:
    return Question(f"Question: {question}\nAnswer:", options, answer)


QUESTIONS = [
    asked("what is the answer", ("the first", "another one", "no", "in the end of it")),
    asked("who", ("a", "an answer that has many more letters than the others")),
    asked("Grüße, 日本?", ("ja", "日本", "no")),
]


def plain_likelihoods(path: Path, question: Question) -> list[tuple[float, int]]:
    """One sequence per option, from scratch: what lm-evaluation-harness asks of a model."""
    from llama_cpp import Llama

    llama = Llama(  # type 0: float32 keys and values, as in scoring
        str(path), n_ctx=CONTEXT, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )
    try:
        result = []
        prompt = llama.tokenize(question.prompt.encode())
        for option in question.options:
            tokens = llama.tokenize(f"{question.prompt} {option}".encode())
            n_ending = len(tokens) - len(prompt)
            tokens = tokens[-(CONTEXT + 1) :]
            llama.reset()
            llama.eval(tokens[:-1])
            logits = np.array(llama.scores[: len(tokens) - 1], dtype=np.float64)[-n_ending:]
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            total = sum(logits[i, token] for i, token in enumerate(tokens[-n_ending:]))
            result.append((float(total), n_ending))
        return result
    finally:
        llama.close()


def assert_like_plain(path: Path, questions: list[Question]) -> None:
    with Model(path) as model:
        scored = option_likelihoods(model, questions)
    for question, found in zip(questions, scored, strict=True):
        expected = plain_likelihoods(path, question)
        assert found.n_tokens == tuple(n for _, n in expected)
        np.testing.assert_allclose(
            found.totals, [total for total, _ in expected], atol=2e-5, rtol=1e-6
        )


def test_options_that_share_a_prompt_score_as_if_alone(tiny_gguf: Path) -> None:
    assert_like_plain(tiny_gguf, QUESTIONS)


def test_a_prompt_beyond_the_context_loses_its_beginning(tiny_gguf: Path) -> None:
    # the prompt alone fits by a hair, so that some options need the cut and others do not
    with Model(tiny_gguf) as model:
        taken = len(model.bos + model.tokenize(asked("x", ()).prompt))
    for spare in (-50, 0, 2, 4):
        long = asked("x" * (CONTEXT - taken + 1 - spare), ("a", "one more answer", "no"))
        assert_like_plain(tiny_gguf, [QUESTIONS[1], long, QUESTIONS[0]])


def test_how_questions_are_batched_does_not_matter(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = QUESTIONS * 30
    with Model(tiny_gguf) as model:
        usual = option_likelihoods(model, questions)
        monkeypatch.setattr(module, "_TOKENS", 1)
        alone = option_likelihoods(model, questions)
        monkeypatch.setattr(module, "_TOKENS", 10_000)
        monkeypatch.setattr(module, "_SEQUENCES", 5)
        few = option_likelihoods(model, questions)
    for one, *others in zip(usual, alone, few, strict=True):
        for other in others:
            assert other.n_tokens == one.n_tokens
            np.testing.assert_allclose(other.totals, one.totals, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("n_letters", [40, 200])  # with 200, some prompts exceed the context
def test_what_prompts_begin_with_is_computed_once(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, n_letters: int
) -> None:
    monkeypatch.setattr(module, "_TOKENS", 30)  # so that the beginning takes several calls
    questions = [
        Question("the " * (n_letters // 4) + item.prompt, item.options, 0) for item in QUESTIONS * 2
    ]
    letters = Question("the " * (n_letters // 4) + "in?", ("a", "b", "c", "d"), 0)
    assert_like_plain(tiny_gguf, [*questions, letters])


def test_a_single_question_and_equal_questions_share_nothing_too_much(tiny_gguf: Path) -> None:
    assert_like_plain(tiny_gguf, QUESTIONS[:1])
    assert_like_plain(tiny_gguf, QUESTIONS[:1] * 3)


def test_spaces_at_the_end_of_a_prompt_belong_to_the_option(tiny_gguf: Path) -> None:
    spaced = Question("the answer:  ", ("one", "no"), 0)
    with Model(tiny_gguf) as model:
        (found,) = option_likelihoods(model, [spaced])
        for text, n_tokens in zip(
            ("the answer:   one", "the answer:   no"), found.n_tokens, strict=True
        ):
            assert n_tokens == len(model.tokenize(text)) - len(model.tokenize("the answer:"))


def test_a_run_that_goes_on_gives_the_same_bits(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOKENS", 300)
    questions = QUESTIONS * 6
    with Model(tiny_gguf, n_threads=1) as model:
        whole = list(score_questions(model, questions))
        assert len(whole) > 3
        assert [i for found in whole for i in found] == list(range(len(questions)))
        skip = {*whole[0], *list(whole[1])[:1]}
        rest = list(score_questions(model, questions, skip=skip))
        everything = {i: one for found in whole for i, one in found.items()}
        again = {i: one for found in rest for i, one in found.items()}
        assert again == {i: one for i, one in everything.items() if i not in skip}
        assert list(score_questions(model, questions, skip=range(len(questions)))) == []


def test_a_shorter_context_cuts_and_says_so(tiny_gguf: Path) -> None:
    with Model(tiny_gguf) as model:
        found: dict[Any, Any] = {}
        for finished in score_questions(model, QUESTIONS[:1], n_ctx=40):
            found |= finished
        assert found[0].cut
        assert not any(one.cut for one in option_likelihoods(model, QUESTIONS))
        with pytest.raises(
            RuntimeFailure,
            match=r"the option .an answer that.* tokens, more than the context of 20",
        ):
            list(score_questions(model, QUESTIONS[:2], n_ctx=20))
        with pytest.raises(RuntimeFailure, match=f"its context is {CONTEXT} tokens, not 999"):
            list(score_questions(model, QUESTIONS, n_ctx=999))


def test_an_option_that_adds_nothing_is_refused(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(tiny_gguf) as model:
        monkeypatch.setattr(model, "tokenize", lambda text: [3] * 5)
        with pytest.raises(RuntimeFailure, match="the option 'a' adds no token to 'the'"):
            option_likelihoods(model, [Question("the", ("a", "b"), 0)])


def test_log_likelihoods_keep_double_precision() -> None:
    logits = np.array([[10.1, -3.3, 0.7], [0.1, 0.2, 0.3]], np.float32)
    exact = logits.astype(np.float64)
    expected = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    found = module.log_likelihoods(logits, [0, 0, 1], [1, 2, 0])
    np.testing.assert_allclose(found, expected[[0, 0, 1], [1, 2, 0]], rtol=1e-14)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_model_that_computes_no_numbers_is_refused(
    odd: float, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "log_total", lambda logits: odd)
    with (
        Model(tiny_gguf) as model,
        pytest.raises(module.NoNumbers, match="computes NaN or infinity"),
    ):
        option_likelihoods(model, [Question("the", ("a", "b"), 0)])
