from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.runtime import evaluate as module
from edgemerge.runtime.evaluate import (
    Likelihoods,
    Question,
    evaluate,
    option_likelihoods,
    read_questions,
)
from edgemerge.runtime.llama import Model
from tests.tiny_gguf import CONTEXT

QUESTIONS = [
    Question("what is the answer", ("the first", "another one", "no", "in the end of it"), 2),
    Question("who", ("a", "an answer that has many more letters than the others"), 0),
    Question("Grüße, 日本?", ("ja", "日本", "no"), 1),
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


@pytest.mark.llama
def test_options_that_share_a_prompt_score_as_if_alone(tiny_gguf: Path) -> None:
    assert_like_plain(tiny_gguf, QUESTIONS)


@pytest.mark.llama
def test_a_prompt_beyond_the_context_loses_its_beginning(tiny_gguf: Path) -> None:
    # the prompt alone fits by a hair, so that some options need the cut and others do not
    with Model(tiny_gguf) as model:
        taken = len(model.bos + model.tokenize(Question("x", ("a", "b"), 0).prompt))
    for spare in (-50, 0, 2, 4):
        long = Question("x" * (CONTEXT - taken + 1 - spare), ("a", "one more answer", "no"), 0)
        assert_like_plain(tiny_gguf, [QUESTIONS[1], long, QUESTIONS[0]])


@pytest.mark.llama
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


@pytest.mark.llama
def test_evaluate_is_repeatable(tiny_gguf: Path) -> None:
    with Model(tiny_gguf, n_threads=1) as one, Model(tiny_gguf, n_threads=2) as two:
        first = evaluate(one, QUESTIONS)
        assert evaluate(one, QUESTIONS) == first
        assert evaluate(two, QUESTIONS) == first


@pytest.mark.llama
def test_score_is_the_harness_arithmetic(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        Question("", ("xx", "xxxxxxxxxx"), 0),
        Question("", ("xx", "xxxxxxxxxx"), 1),
        Question("", ("x", "y"), 1),
        Question("", ("x", "y"), 1),
    ]
    scored = [
        Likelihoods((-2.0, -5.0), (1, 4)),  # acc right; by characters -1.0 < -0.5: wrong
        Likelihoods((-2.0, -5.0), (1, 4)),  # the other way round
        Likelihoods((-3.0, -1.0), (2, 1)),  # right both ways
        Likelihoods((-3.0, -3.0), (2, 2)),  # a tie goes to the first: wrong both ways
    ]
    monkeypatch.setattr(module, "option_likelihoods", lambda model, items: scored)
    with Model(tiny_gguf) as model:
        score = evaluate(model, questions)
    assert score.acc == 0.5
    assert score.acc_norm == 0.5
    assert score.loss == pytest.approx((2.0 + 5.0 + 1.0 + 3.0) / (1 + 4 + 1 + 2))
    assert score.n == 4
    # lm-evaluation-harness: sample standard deviation / sqrt(n)
    assert score.stderr == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)


def test_the_stored_questions_can_be_read(eval_dir: Path) -> None:
    sizes = {path.stem: len(read_questions(path)) for path in eval_dir.glob("*.jsonl")}
    assert sizes == {"disease": 500, "substance": 500, "general": 300}


GOOD = json.dumps({"question": "q", "options": ["a", "b"], "answer": 1, "id": "kept out"})


def test_blank_lines_and_other_keys_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "good.jsonl"
    path.write_text(f"\n{GOOD}\n\n", encoding="utf-8")
    assert read_questions(path) == [Question("q", ("a", "b"), 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"options": ["a", "b"], "answer": 0}', "'question' must be a text"),
        ('{"question": "q", "answer": 0}', "'options' must be a list"),
        ('{"question": "q", "options": ["a"], "answer": 0}', "two or more"),
        ('{"question": "q", "options": ["a", " "], "answer": 0}', "not empty"),
        ('{"question": "q", "options": ["a", 1], "answer": 0}', "must be texts"),
        ('{"question": "q", "options": ["a", "b"], "answer": 2}', "0 to 1"),
        ('{"question": "q", "options": ["a", "b"], "answer": true}', "0 to 1"),
        ('{"question": "q", "options": ["a", "b"], "answer": "a"}', "0 to 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(FormatError, match=message) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert caught.value.path == path


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(FormatError, match="no questions"):
        read_questions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        read_questions(path)
