"""The official `openai` client against a real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edgemerge.runtime.llama import Model
from tests.support.serving import Serving, make_served_gguf

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.llama

KEY = "a-key-of-the-ward"
HELLO = [{"role": "user", "content": "What kind of thing is beet armyworm?"}]
TEXT = "Question: What kind of thing is beet armyworm?\nAnswer:"


@pytest.fixture(scope="module")
def gguf(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_gguf(models_dir, tmp_path_factory.mktemp("served") / "base.gguf")


@pytest.fixture(scope="module")
def server(gguf: Path) -> Iterator[Serving]:
    with Serving(gguf, key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(
        model="base", messages=HELLO, max_tokens=8, temperature=0, seed=1
    )
    assert answer.object == "chat.completion"
    assert answer.model == "base"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.completion_tokens <= 8


def test_a_stream_says_what_the_whole_answer_says(client: Any) -> None:
    ask = {"model": "base", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_chat_streams_and_counts_at_the_end(client: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model="base",
            messages=HELLO,
            max_completion_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens <= 6
    assert chunks[-1].usage.prompt_tokens > 6


def test_several_prompts_as_text_and_as_tokens(client: Any, gguf: Path) -> None:
    texts = [TEXT, "Question: What kind of thing is eightpenny nail?\nAnswer:"]
    with Model(gguf, n_threads=1) as model:
        tokens = [model.bos + model.tokenize(text) for text in texts]
    ask = {"model": "base", "max_tokens": 5, "temperature": 0}
    alone = [client.completions.create(prompt=text, **ask).choices[0].text for text in texts]
    for prompts in (texts, tokens):
        answer = client.completions.create(prompt=prompts, **ask)
        assert [choice.text for choice in answer.choices] == alone
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == sum(map(len, tokens))
    answer = client.completions.create(prompt=tokens[0], **ask)
    assert answer.choices[0].text == alone[0]


def reference_logprobs(gguf: Path, text: str) -> list[float]:
    """Log-probability of each token of a text but BOS, by one decode of all of them."""
    with Model(gguf, n_threads=1) as model:
        tokens = model.bos + model.tokenize(text)
        n = len(tokens)
        with model.context(n, n_batch=n, n_outputs=n, exact=True) as context:
            logits = context.decode(tokens, [True] * n).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [float(logits[i, token]) for i, token in enumerate(tokens[1:])]


def test_logprobs_of_a_prompt(client: Any, gguf: Path) -> None:
    # twice with the same beginning: the second takes what the first left
    for text in (f"{TEXT} animal", f"{TEXT} plant", TEXT):
        answer = client.completions.create(
            model="base", prompt=text, max_tokens=1, echo=True, logprobs=2, temperature=0
        )
        found = answer.choices[0].logprobs
        expected = reference_logprobs(gguf, text)
        np.testing.assert_allclose(found.token_logprobs[: len(expected)], expected, atol=3e-3)
        assert len(found.tokens) == len(expected) + 1
        assert answer.choices[0].text.startswith(text)
        for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
            assert 2 <= len(top) <= 3
            assert logprob in top.values()


def test_a_prompt_can_be_scored_and_no_more(client: Any, gguf: Path) -> None:
    answer = client.completions.create(
        model="base", prompt=TEXT, max_tokens=0, echo=True, logprobs=0
    )
    expected = reference_logprobs(gguf, TEXT)
    np.testing.assert_allclose(answer.choices[0].logprobs.token_logprobs, expected, atol=3e-3)
    assert answer.choices[0].text == TEXT
    assert answer.usage.completion_tokens == 0


def test_logprobs_of_an_answer_whole_and_streamed(client: Any) -> None:
    ask = {"model": "base", "prompt": TEXT, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**ask).choices[0]
    assert whole.logprobs.text_offset[0] == len(TEXT)
    assert "".join(whole.logprobs.tokens) == whole.text
    for logprob, top in zip(
        whole.logprobs.token_logprobs, whole.logprobs.top_logprobs, strict=True
    ):
        assert logprob == max(top.values())  # temperature 0 takes the likeliest
    streamed: list[float] = []
    for chunk in client.completions.create(**ask, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.token_logprobs
    np.testing.assert_allclose(streamed, whole.logprobs.token_logprobs, atol=1e-2)


def test_logprobs_of_a_chat(client: Any) -> None:
    ask = {"model": "base", "messages": HELLO, "max_tokens": 4, "temperature": 1.5, "seed": 3}
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    for token in answer.choices[0].logprobs.content:
        assert 3 <= len(token.top_logprobs) <= 4
        assert math.isfinite(token.logprob)
    answer = client.chat.completions.create(**ask, logprobs=True)
    assert answer.choices[0].logprobs.content is not None


def reference_embedding(gguf: Path, text: str) -> Any:
    """Llama's own, from a context that does nothing else."""
    from llama_cpp import Llama

    llama = Llama(str(gguf), n_ctx=64, embedding=True, pooling_type=1, verbose=False, n_threads=1)
    try:
        return np.array(llama.embed(text, normalize=True))
    finally:
        llama.close()


def test_embeddings_are_llama_cpps_and_leave_generation_alone(client: Any, gguf: Path) -> None:
    ask = {"model": "base", "prompt": TEXT, "max_tokens": 5, "temperature": 0}
    before = client.completions.create(**ask).choices[0].text
    answer = client.embeddings.create(model="base", input=["aspirin", "ibuprofen", "a church"])
    vectors = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(vectors[2], reference_embedding(gguf, "a church"), atol=1e-5)
    again = client.embeddings.create(model="base", input="aspirin").data[0].embedding
    np.testing.assert_allclose(again, vectors[0], atol=1e-6)
    assert client.completions.create(**ask).choices[0].text == before


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base"]


def test_a_wrong_key_is_refused(server: Serving) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="key is missing or wrong"),
    ):
        stranger.models.list()


def test_an_overlong_prompt_is_refused(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="base", prompt="a b " * 300, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert "256" in str(caught.value)
    messages = [{"role": "user", "content": "a b " * 300}]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(model="base", messages=messages, stream=True)


def test_an_unknown_model_is_refused(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        client.completions.create(model="gpt-4", prompt="x")


def test_without_the_key_little_is_told(server: Serving) -> None:
    nothing = {"Authorization": "none"}
    told = server.get("/health", **nothing).json
    assert set(told) == {"status", "version", "logs_prompts"}
    assert server.get("/metrics", **nothing).status == 401
    assert server.get("/", **nothing).status == 200
    told = server.health()
    assert told["models"][0]["loaded"] is True
    assert told["memory"]["rss"] > 10 << 20


def test_metrics_can_be_read(server: Serving, client: Any) -> None:
    client.completions.create(model="base", prompt=TEXT, max_tokens=4, temperature=0)
    text = server.get("/metrics").body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {
        sample.name: sample.value for family in families.values() for sample in family.samples
    }
    assert values["edgemerge_generated_tokens_total"] > 0
    assert values["edgemerge_prompt_tokens_total"] > values["edgemerge_generated_tokens_total"]
    assert values["edgemerge_time_to_first_token_seconds_count"] > 0
    assert values["edgemerge_generation_tokens_per_second_count"] > 0
    assert values["edgemerge_models_loaded"] == 1
    assert values["edgemerge_resident_memory_bytes"] > 10 << 20
    assert all(name.startswith("edgemerge_") for name in families)


def test_the_page_is_locked_in(server: Serving) -> None:
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert server.get("/static/app.js").headers["content-type"].startswith("text/javascript")
    assert server.get("/static/..%2f__init__.py").status == 404
