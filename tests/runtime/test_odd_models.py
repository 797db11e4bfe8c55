"""No model takes the process down: odd headers and tokenizers end in an answer or in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.odd_runs import TEXT
from tests.support.open_gguf import OddModel, load_base
from tests.support.places import TESTS
from tests.support.serving import Serving
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama
pytest.importorskip("llama_cpp")


def fuzz(first: int, last: int) -> None:
    """In a process of its own: it forks one for each model."""
    command = [sys.executable, "-m", "tools.fuzz.odd", str(first), str(last)]
    result = subprocess.run(
        command, cwd=TESTS.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == f"{last - first} models, 0 findings\n"


def test_forty_odd_models_end_in_an_answer_or_a_sentence() -> None:
    fuzz(0, 40)


@pytest.mark.slow
def test_four_hundred_odd_models_end_in_an_answer_or_a_sentence() -> None:
    fuzz(40, 440)


def make_bad(folder: Path, kind: str) -> Path:
    model = load_base(write_tiny_gguf(folder / "tiny.gguf"))
    texts = model.texts()
    if kind == "repeated":
        texts[270] = b"er"
    elif kind == "no bytes":
        texts = [b"-" + text[1:] if text.startswith(b"<0x") else text for text in texts]
    model.set("tokenizer.ggml.tokens", texts, "[str]")
    if kind == "f16 norms":
        set_f16(model, "_norm.weight")
    if kind in ("none", "bert"):
        model.set("tokenizer.ggml.model", kind, "str")
    return model.write(folder / "bad.gguf")


def set_f16(model: OddModel, end: str) -> None:
    for name, (shape, _, data) in model.tensors.items():
        if name.endswith(end):
            model.tensors[name] = (shape, "F16", data[: len(data) // 2])


SENTENCES = {
    "repeated": "has the token 'er' under the ids 262 and 270",
    "no bytes": "has a SentencePiece vocabulary without a token for 226 of the 256 bytes",
    "f16 norms": "is F16 where llama.cpp computes with F32 alone",
    "none": "has no vocabulary (tokenizer.ggml.model is none)",
    "bert": "has tokens for bytes in a vocabulary that has none",
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_a_command_says_one_sentence(tmp_path: Path, kind: str) -> None:
    bad = make_bad(tmp_path, kind)
    command = [sys.executable, "-m", "edgemerge", "run", str(bad), "-p", TEXT, "-n", "2", "--raw"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert SENTENCES[kind] in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_server_with_such_a_model_says_so_and_does_not_start(tmp_path: Path) -> None:
    bad = make_bad(tmp_path, "repeated")
    command = [sys.executable, "-m", "edgemerge", "serve", str(tmp_path / "tiny.gguf"), str(bad)]
    result = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert SENTENCES["repeated"] in result.stderr


def test_no_backtrace_is_asked_for() -> None:
    code = "from edgemerge.runtime.library import load_library; load_library(); import os; "
    code += "print(os.environ['GGML_NO_BACKTRACE'])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "1\n"


def test_an_encoder_embeds_a_long_text_whole_and_writes_none(tmp_path: Path) -> None:
    model = write_tiny_bert(tmp_path / "bert.gguf")
    text = "a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3 4 5 6 7 8 9 0 a b c d e f g h"
    with Serving(model) as server:
        first = server.post("/v1/embeddings", {"input": text})
        assert first.status == 200
        refused = server.post("/v1/completions", {"prompt": "a b", "max_tokens": 2})
        assert refused.status == 400
        assert "does not continue them" in refused.body.decode()
        # the last word reaches the first word's row, which it does not where texts are cut up
        other = server.post("/v1/embeddings", {"input": text[:-1] + "z"})
        assert other.json["data"][0]["embedding"] != first.json["data"][0]["embedding"]
    command = [sys.executable, "-m", "edgemerge", "run", str(model), "-p", "a", "-n", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "a bert model does not continue a text" in result.stderr
