"""Clients that people have, each against a real server."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.serving import Serving, make_served_gguf
from tests.support.tiny_bert import write_tiny_bert

pytestmark = pytest.mark.llama

KEY = "a-key-of-the-ward"
HELLO = [{"role": "user", "content": "What kind of thing is beet armyworm?"}]
PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["ward", "home"]}, "beds": {"type": "boolean"}},
    "required": ["place", "beds"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": PLACE}}


@pytest.fixture(scope="module")
def server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    gguf = make_served_gguf(models_dir, tmp_path_factory.mktemp("served") / "base.gguf")
    with Serving(gguf, key=KEY) as server:
        yield server
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_several_answers_whole_and_streamed(client: Any) -> None:
    ask = {"model": "base", "messages": HELLO, "n": 3, "seed": 1, "temperature": 2, "max_tokens": 8}
    whole = client.chat.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    assert whole.usage.prompt_tokens < 60  # counted once
    streamed = ["", "", ""]
    reasons = {}
    for chunk in client.chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert streamed == texts
    assert reasons == {i: choice.finish_reason for i, choice in enumerate(whole.choices)}


def test_several_prompts_streamed(client: Any) -> None:
    ask = {"model": "base", "prompt": ["Once", "Twice"], "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(**ask)
    texts = ["", ""]
    options = {"include_usage": True}
    for chunk in client.completions.create(**ask, stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunk.usage.total_tokens == whole.usage.total_tokens


def test_stops_penalties_and_biases(client: Any) -> None:
    ask = {"model": "base", "prompt": "Once upon", "temperature": 0, "max_tokens": 12}
    text = client.completions.create(**ask).choices[0].text
    word = text.split()[2]
    stopped = client.completions.create(**ask, stop=[word]).choices[0]
    assert stopped.text == text[: text.index(word)]
    assert stopped.finish_reason == "stop"
    penalised = client.completions.create(**ask, frequency_penalty=2, presence_penalty=2)
    assert penalised.choices[0].text != text
    first = client.completions.create(**ask, logprobs=1).choices[0].logprobs.tokens[0]
    tokens = client.post("/../tokenize", body={"prompt": text}, cast_to=dict[str, Any])["tokens"]
    bias = dict.fromkeys(map(str, tokens), -100)
    biased = client.completions.create(**ask, logit_bias=bias, logprobs=1).choices[0]
    assert first not in biased.logprobs.tokens


def test_a_format_is_kept(client: Any) -> None:
    ask = {"model": "base", "messages": HELLO, "max_tokens": 60, "temperature": 1}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PLACE}}
    for seed in range(3):
        answer = client.chat.completions.create(**ask, seed=seed, response_format=form)
        found = json.loads(answer.choices[0].message.content)
        assert found["place"] in ("ward", "home")
        assert isinstance(found["beds"], bool)


def test_a_tool_is_called_whole_and_streamed(client: Any) -> None:
    short = [{"role": "user", "content": "Where?"}]  # the model reads 256 tokens
    ask = {"model": "base", "messages": short, "max_tokens": 80, "tools": [TOOL], "seed": 1}
    ask["tool_choice"] = "required"
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "look_up"
    assert set(json.loads(call.function.arguments)) == {"place", "beds"}
    assert choice.message.content is None
    streamed: list[Any] = []
    reasons: list[Any] = []
    for chunk in client.chat.completions.create(**ask, stream=True):
        assert not chunk.choices[0].delta.content
        streamed += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert [call.function.arguments for call in streamed] == [call.function.arguments]
    assert reasons[-1] == "tool_calls"
    after = [
        *short,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "a moth"},
    ]
    answer = client.chat.completions.create(model="base", messages=after, max_tokens=4)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_responses_whole_and_streamed(client: Any) -> None:
    ask: dict[str, Any] = {
        "model": "base",
        "input": "What is beet armyworm?",
        "instructions": "Be brief.",
    }
    ask |= {"max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**ask)
    assert whole.status in ("completed", "incomplete")
    assert whole.usage.output_tokens <= 8
    kinds, text = [], ""
    for event in client.responses.create(**ask, stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == whole.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == f"response.{whole.status}"


def test_embeddings_of_tokens_and_in_base64(client: Any, server: Serving) -> None:
    texts = ["aspirin", "a church"]
    tokens = [server.post("/tokenize", {"prompt": text}).json["tokens"] for text in texts]
    vectors = []
    for given in (texts, tokens):
        for form in ("float", "base64"):
            ask = {"model": "base", "input": given, "encoding_format": form}
            data = server.post("/v1/embeddings", ask).json["data"]
            rows = [item["embedding"] for item in data]
            if form == "base64":
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            vectors.append(np.array(rows))
    for other in vectors[1:]:
        np.testing.assert_allclose(other, vectors[0], atol=1e-6)
    assert len(client.embeddings.create(model="base", input=texts).data) == 2  # asks for base64


def test_models_can_be_looked_up(client: Any) -> None:
    openai = pytest.importorskip("openai")
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_what_the_model_cannot_do_is_said(server: Serving) -> None:
    answer = server.post("/v1/rerank", {"query": "a", "documents": ["b"]})
    assert answer.status == 400
    assert "does not order texts" in answer.error["message"]


def test_texts_are_ordered(tmp_path: Path) -> None:
    texts = ["a b c", "x y z", "d 5"]
    with Serving(write_tiny_bert(tmp_path / "rank.gguf", ranks=True)) as server:

        def order(documents: list[Any], **more: Any) -> list[dict[str, Any]]:
            answer = server.post("/v1/rerank", {"query": "a", "documents": documents, **more})
            found: list[dict[str, Any]] = answer.json["results"]
            return found

        found = order([{"text": text} for text in texts], return_documents=True)
        scores = [item["relevance_score"] for item in found]
        assert scores == sorted(scores, reverse=True)
        assert [texts[item["index"]] for item in found] == [i["document"]["text"] for i in found]
        turned = order(texts[::-1], top_n=2)
        assert [2 - item["index"] for item in turned] == [item["index"] for item in found[:2]]
        np.testing.assert_allclose([item["relevance_score"] for item in turned], scores[:2])
        for path, body in (
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/completions", {"prompt": "a"}),
        ):
            assert server.post(path, body).status == 400


def test_langchain(server: Serving) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    names = {"base_url": f"{server.url}/v1", "api_key": KEY, "model": "base"}
    chat = langchain.ChatOpenAI(**names, max_tokens=8, temperature=0)
    whole = chat.invoke("What is beet armyworm?")
    assert whole.usage_metadata["output_tokens"] <= 8
    assert (
        "".join(chunk.content for chunk in chat.stream("What is beet armyworm?")) == whole.content
    )
    tools = chat.bind_tools([TOOL], tool_choice="required")
    (call,) = tools.bind(max_tokens=80).invoke("Where?").tool_calls
    assert call["name"] == "look_up"
    embed = langchain.OpenAIEmbeddings(**names, check_embedding_ctx_length=False)
    assert len(embed.embed_documents(["aspirin", "a church"])) == 2


def test_llama_index(server: Serving) -> None:
    module = pytest.importorskip(
        "llama_index.llms.openai_like", reason="pip install llama-index-llms-openai-like"
    )
    names = {"api_base": f"{server.url}/v1", "api_key": KEY, "model": "base", "max_tokens": 8}
    for is_chat in (True, False):
        model = module.OpenAILike(**names, is_chat_model=is_chat, temperature=0)
        whole = model.complete("What is beet armyworm?").text
        assert (
            "".join(part.delta for part in model.stream_complete("What is beet armyworm?")) == whole
        )


SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: process.argv[3] });
const ask = { model: "base", messages: [{ role: "user", content: "Hello?" }], max_tokens: 6, seed: 1 };
const whole = await client.chat.completions.create(ask);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
const vectors = await client.embeddings.create({ model: "base", input: ["a", "b"] });
const models = [];
for await (const model of client.models.list()) models.push(model.id);
let refused = "";
try {
  await client.chat.completions.create({ ...ask, model: "gpt-4" });
} catch (error) {
  refused = error.status + " " + error.code;
}
console.log(JSON.stringify([whole.choices[0].message.content, text, vectors.data.length, models, refused]));
"""


def test_javascript(server: Serving, tmp_path: Path) -> None:
    package = Path(os.environ.get("EDGEMERGE_OPENAI_JS", ""))  # a folder with node_modules
    if shutil.which("node") is None or not (package / "node_modules" / "openai").is_dir():
        pytest.skip("npm install openai, and name the folder in EDGEMERGE_OPENAI_JS")
    (tmp_path / "node_modules").symlink_to((package / "node_modules").resolve())
    script = tmp_path / "ask.mjs"
    script.write_text(SCRIPT)
    command = ["node", str(script), server.url, KEY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    whole, text, n_vectors, models, refused = json.loads(done.stdout)
    assert whole == text
    assert (n_vectors, models, refused) == (2, ["base"], "404 model_not_found")


def test_open_webuis_requests(server: Serving) -> None:
    """Those of its backend (routers/openai.py and utils/task.py), with all that they carry."""
    listed = server.get("/v1/models").json["data"]
    chat = {
        "stream": True,
        "model": listed[0]["id"],
        "messages": HELLO,
        "temperature": 0.8,
        "max_tokens": 8,
        "stream_options": {"include_usage": True},
        "user": {"name": "Nurse", "id": "1"},
        "features": {"web_search": False},
        "metadata": {"chat_id": "1"},
        "stop": None,
        "seed": None,
        "tools": None,
    }
    answer = server.post("/v1/chat/completions", chat)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.body.decode().split("\n\n") if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert lines[-1] == "data: [DONE]"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert events[-1]["usage"]["completion_tokens"] <= 8
    title = {**chat, "stream": False, "max_completion_tokens": 20, "stream_options": None}
    del title["max_tokens"]
    told = server.post("/v1/chat/completions", title).json
    assert told["choices"][0]["message"]["role"] == "assistant"
    embed = {"model": "base", "input": ["a", "b"]}
    assert len(server.post("/v1/embeddings", embed).json["data"]) == 2
