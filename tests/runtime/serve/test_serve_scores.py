from __future__ import annotations

import json

import numpy as np
import pytest

from edgemerge.runtime.serve.scores import TokenScore, score_token, write_logprobs

PIECES = {1: b"The", 2: b" heart", 3: "é".encode()[:1], 4: "é".encode()[1:], 5: b"The"}


def test_scores_are_the_log_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(1000) * 10).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    score = score_token(logits, 7, 5)
    assert score.logprob == pytest.approx(exact[7], abs=1e-12)
    assert [token for token, _ in score.alternatives] == np.argsort(-exact)[:5].tolist()
    best = int(np.argmax(exact))
    assert score_token(logits, best, 1).alternatives == (
        (best, score_token(logits, best, 0).logprob),
    )


def test_equal_logits_and_more_alternatives_than_tokens() -> None:
    score = score_token(np.zeros(4, dtype=np.float32), 2, 20)
    assert [token for token, _ in score.alternatives] == [0, 1, 2, 3]
    assert score.logprob == pytest.approx(-np.log(4))


def test_what_is_impossible_is_still_json() -> None:
    logits = np.array([0.0, -np.inf], dtype=np.float32)
    assert score_token(logits, 1, 2).logprob == -9999.0


def test_it_is_written_as_openai_does() -> None:
    scores = [
        TokenScore(1, None),
        TokenScore(2, -1.0, ((1, -0.5),)),
        TokenScore(3, -2.0, ((3, -2.0),)),
        TokenScore(4, -3.0, ((5, -0.1),)),
    ]
    written = write_logprobs(scores, PIECES.__getitem__, 10, alternatives=True)
    assert json.loads(json.dumps(written)) == {
        "tokens": ["The", " heart", "�", "�"],
        "token_logprobs": [None, -1.0, -2.0, -3.0],
        "top_logprobs": [
            None,
            {"The": -0.5, " heart": -1.0},
            {"�": -2.0},
            {"The": -0.1, "�": -3.0},
        ],
        "text_offset": [10, 13, 19, 19],
    }
    plain = write_logprobs(scores[1:2], PIECES.__getitem__, 0, alternatives=False)
    assert plain["top_logprobs"] == [{}]
