from __future__ import annotations

import json

from edgemerge.runtime.engine.messages import TokenScore
from edgemerge.runtime.serve.scores import write_chat_logprobs, write_logprobs

FIRST, LAST = "é".encode()[:1], "é".encode()[1:]


def test_it_is_written_as_openai_does() -> None:
    scores = [
        TokenScore(1, b"The", None),
        TokenScore(2, b" heart", -1.0, ((1, b"The", -0.5),)),
        TokenScore(3, FIRST, -2.0, ((3, FIRST, -2.0),)),
        TokenScore(4, LAST, -3.0, ((5, b"The", -0.1),)),
    ]
    written = write_logprobs(scores, 10, alternatives=True)
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
    plain = write_logprobs(scores[1:2], 0, alternatives=False)
    assert plain["top_logprobs"] == [{}]


def test_a_chats_are_written_as_openai_does() -> None:
    scores = [TokenScore(3, FIRST, -2.0, ((1, b"The", -0.5),))]
    assert json.loads(json.dumps(write_chat_logprobs(scores))) == {
        "content": [
            {
                "token": "\ufffd",
                "logprob": -2.0,
                "bytes": [195],
                "top_logprobs": [{"token": "The", "logprob": -0.5, "bytes": [84, 104, 101]}],
            }
        ],
        "refusal": None,
    }
