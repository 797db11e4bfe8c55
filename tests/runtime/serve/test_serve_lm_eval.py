"""lm-evaluation-harness's own models for servers, in a process of their own, on ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgemerge.runtime.evaluation.likelihood import option_likelihoods
from edgemerge.runtime.evaluation.questions import read_questions
from edgemerge.runtime.llama import Model
from tests.support.serving import Serving, make_served_gguf

pytestmark = pytest.mark.llama

N_QUESTIONS = 40
# `auto` finds the server's own tokenizer. Texts are sent, not tokens: the harness puts no BOS before
# those. A vocabulary with BOS gets it from the server then.
HARNESS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

if sys.argv[2] == "gguf":
    from lm_eval.models.gguf import GGUFLM
    harness = GGUFLM(base_url=sys.argv[1])
else:
    harness = LocalCompletionsAPI(
        base_url=sys.argv[1] + "/v1/completions",
        model="base",
        tokenizer_backend="auto",
        tokenized_requests=sys.argv[2] == "tokens",
        batch_size=int(sys.argv[3]),
        max_length=256,
    )
pairs = json.load(sys.stdin)
requests = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
print(json.dumps(harness.loglikelihood(requests, disable_tqdm=True)))
texts = [Instance("generate_until", {}, (p[0], {"until": ["\\n"], "max_gen_toks": 4}), 0)
         for p in pairs[:2]]
print(json.dumps(harness.generate_until(texts, disable_tqdm=True)))
"""

CHATS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion
from lm_eval.models.api_models import JsonChatStr

harness = LocalChatCompletion(base_url=sys.argv[1] + "/v1/chat/completions", model="base", batch_size=1)
texts = [
    Instance("generate_until", {}, (JsonChatStr(json.dumps([{"role": "user", "content": text}])),
             {"until": ["\\n"], "max_gen_toks": 4}), 0)
    for text in json.load(sys.stdin)
]
print(json.dumps(harness.generate_until(texts, disable_tqdm=True)))
"""


@pytest.fixture(scope="module")
def gguf(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_gguf(models_dir, tmp_path_factory.mktemp("served") / "base.gguf")


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install 'lm_eval[api]'")
@pytest.mark.parametrize(("sent", "batch"), [("texts", 4), ("tokens", 4), ("gguf", 1)])
def test_the_harness_gets_our_answers(gguf: Path, eval_dir: Path, sent: str, batch: int) -> None:
    questions = read_questions(eval_dir / "disease.jsonl")[:N_QUESTIONS]
    pairs = [(item.prompt, f" {option}") for item in questions for option in item.options]
    with Serving(gguf) as server:
        done = subprocess.run(
            [sys.executable, "-c", HARNESS, server.url, sent, str(batch)],
            input=json.dumps(pairs),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    *_, scores, texts = done.stdout.splitlines()
    found = np.array([logprob for logprob, _is_greedy in json.loads(scores)]).reshape(-1, 4)
    with Model(gguf, n_threads=1) as model:
        if sent == "tokens":
            model.bos = []
        expected = np.array([item.totals for item in option_likelihoods(model, questions)])
    np.testing.assert_allclose(found, expected, atol=5e-3)  # keys and values in half precision
    assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()
    assert all(isinstance(text, str) for text in json.loads(texts))


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install 'lm_eval[api]'")
def test_the_harness_chats(gguf: Path) -> None:
    asked = ["What kind of thing is beet armyworm?", "What kind of thing is eightpenny nail?"]
    with Serving(gguf) as server:
        done = subprocess.run(
            [sys.executable, "-c", CHATS, server.url],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"},
        )
        expected = []
        for text in asked:
            chat = {"messages": [{"role": "user", "content": text}], "stop": ["\n"]}
            answer = server.post(
                "/v1/chat/completions", {**chat, "max_tokens": 4, "temperature": 0}
            )
            expected.append(answer.json["choices"][0]["message"]["content"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
