from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.talking import COMMAND, SLOWLY, TEMPLATE, Terminal, run
from tests.support.tiny_gguf import CONTEXT, write_tiny_gguf

pytestmark = pytest.mark.llama

FIGURES = re.compile(
    r"prompt (\d+) tokens, [\d.]+ tokens/s; answer (\d+) tokens?(?:, [\d.]+ tokens/s)?; "
    r"first token after [\d.]+ s; memory [\d.]+ MiB, of it weights [\d.]+ \w+, "
    r"KV cache [\d.]+ \w+(?:; seed (\d+))?\n"
)
NO_TEMPLATE = "note: tiny.gguf has no chat template: the text is continued; see --template\n"
CUT_OFF = (
    "note: the answer was cut off at --max-tokens; more with -n N, or -n 0 for all that fits\n"
)


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_tiny_gguf(path / "tiny.gguf")
    (path / "chat.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(path)
    return path


def say(*arguments: object, stdin: str | None = None) -> dict[str, object]:
    result = run("run", "tiny.gguf", *arguments, "--json", stdin=stdin)
    assert result.exit_code == 0
    assert result.stderr in ("", NO_TEMPLATE)
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def test_text_on_stdout_and_figures_on_stderr() -> None:
    result = run("run", "tiny.gguf", "-p", "the answer", "-n", 8, "--temp", 0, "--seed", 3)
    assert result.stderr.startswith(NO_TEMPLATE + CUT_OFF)
    found = FIGURES.fullmatch(result.stderr.removeprefix(NO_TEMPLATE + CUT_OFF))
    assert found is not None, result.stderr
    assert found.groups()[1:] == ("8", None)  # nothing was drawn, so there was no seed
    document = say("-p", "the answer", "-n", 8, "--temp", 0)
    said = str(document["text"])
    assert result.stdout.rstrip("\n") == "".join(c for c in said if c in "\n\t" or c >= " ")
    assert result.stdout.endswith("\n")
    assert (document["end"], document["generated_tokens"]) == ("length", 8)


def test_the_seed_repeats_the_text_and_is_told() -> None:
    first = say("-p", "the", "-n", 12)
    again = say("-p", "the", "-n", 12, "--seed", first["seed"])
    assert again["text"] == first["text"]
    assert say("-p", "the", "-n", 12)["seed"] != first["seed"]


def test_figures_that_are_not_known_are_left_out() -> None:
    result = run("run", "tiny.gguf", "--raw", "-p", "the answer", "-n", 1, "--seed", 3)
    found = FIGURES.fullmatch(result.stderr.removeprefix(CUT_OFF))
    assert found is not None, result.stderr
    assert found.groups()[1:] == ("1", "3")
    assert "; answer 1 token; first" in result.stderr


def test_where_the_prompt_comes_from(folder: Path) -> None:
    (folder / "prompt.txt").write_text("the answer\n")
    given = ("-n", 6, "--temp", 0)
    expected = say("-p", "the answer", *given)["text"]
    assert say("--file", "prompt.txt", *given)["text"] == expected
    assert say(*given, stdin="the answer\n")["text"] == expected
    assert say("-p", "-", *given, stdin="the answer")["text"] == expected
    assert say("-p", "", *given, stdin="the answer")["text"] == expected
    expected = say("-p", "the\n\nanswer", *given)["text"]
    assert say("-p", "the", *given, stdin="answer\n")["text"] == expected


def test_a_pipe_that_is_left_open_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ssh without -n leaves one: nobody writes there, and it does not end by itself."""
    start = (
        "import edgemerge.cli.run as r; r.PATIENCE = 0.1; from edgemerge.cli import main; main()"
    )
    process = subprocess.Popen(
        [*COMMAND[:1], "-c", start, "run", "tiny.gguf", "-p", "the", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.readline()
    assert (
        said
        == "note: waiting for the text on stdin that goes after the prompt (none: </dev/null)\n"
    )
    out, _ = process.communicate("answer", timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["prompt_tokens"] == say("-p", "the\n\nanswer")["prompt_tokens"]


def test_more_than_the_machine_has_is_told() -> None:
    result = run("run", "tiny.gguf", "-p", "the", "-n", 1, "-t", 512, "-g", 1)
    assert result.exit_code == 0
    assert "note: 512 threads share " in result.stderr
    from edgemerge.runtime.library import load_library

    is_on_gpu = load_library().has_device()
    assert ("was built without GPU support" in result.stderr) == (not is_on_gpu)


def test_the_template_is_used_but_for_raw() -> None:
    given = ("-n", 6, "--temp", 0)
    as_message = say("-p", "the answer", "--template", "chat.jinja", *given)
    assert as_message["text"] == say("-p", "u.the answer.a.", *given)["text"]
    assert as_message["text"] == say("-p", "<s>u.the answer.a.", "--raw", *given)["text"]
    brief = say("-p", "hi", "--system", "be brief", "--template", "chat.jinja", *given)
    assert brief["text"] == say("-p", "s.be brief.u.hi.a.", *given)["text"]


def test_the_context_is_as_large_as_is_needed() -> None:
    document = say("-p", "the answer", "-n", 6)
    assert document["context"] == int(str(document["prompt_tokens"])) + 6
    document = say("-p", "the answer", "-n", 1000)
    assert document["context"] == CONTEXT
    assert document["end"] in {"context", "model"}
    assert say("-p", "the answer", "-n", 1000, "-c", 64)["context"] == 64


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("", 1, "edgemerge: the prompt is empty: give the model at least one word"),
        ("-p x --file chat.jinja", 2, "give the prompt with -p or with --file, not both"),
        ("-p x --raw --system y", 2, "--raw continues the text as it is: no --system"),
        ("-p x -t 513", 2, "Invalid value for '-t' / '--threads'"),
        ("-p x --lora a=nan", 2, "--lora 'a=nan': the scale 'nan' is no number"),
        ("-p x --temp -1", 2, "Invalid value for '--temperature'"),
        ("-p x --system y", 1, "tiny.gguf: this model has no chat template and so no place for"),
        ("-p \udcff", 1, "edgemerge: the prompt is not UTF-8 text: convert it first"),
        ("-p x --system \udcff", 1, "edgemerge: the system prompt is not UTF-8 text"),
        ("--file none", 1, "edgemerge: none: No such file or directory; check the path"),
        ("--file tiny.gguf", 1, "edgemerge: tiny.gguf is not UTF-8 text: convert it first"),
        ("-p x --template none", 1, "edgemerge: none: No such file or directory"),
        ("-p x --template tiny.gguf", 1, "edgemerge: tiny.gguf: not UTF-8 text"),
        ("-p xxxxxxxxxxxx -c 8", 1, "tokens and the context is 8: shorten the prompt"),
        ("-p x --lora none.gguf", 1, "edgemerge: none.gguf: there is no such file"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: str, code: int, sentence: str) -> None:
    result = run("run", "tiny.gguf", *arguments.split())
    assert result.exit_code == code
    assert sentence in re.sub(r"\s*[│\n]\s*", " ", result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_control_characters_do_not_reach_the_terminal() -> None:
    from edgemerge.cli.generation import clean

    assert clean("a\x1b[2J\rb\x07\x9b1m\tc\n") == "a[2Jb1m\tc\n"
    assert clean("日本\u3000👩\u200d💻") == "日本\u3000👩\u200d💻"


def test_ctrl_c_keeps_the_text_and_its_figures(folder: Path) -> None:
    given = ("run", "tiny.gguf", "-p", "the answer", "-n", "1000")
    with Terminal(*SLOWLY, *given, folder=folder) as terminal:
        terminal.wait_for("word word word ")
        terminal.type("\x03")
        code, seen = terminal.wait_for_end()
    assert code == 128 + signal.SIGINT
    assert seen.endswith("edgemerge: interrupted\n")
    assert re.search(r"answer \d+ tokens, [\d.]+ tokens/s", seen)
    assert "Traceback" not in seen
    assert "Exception" not in seen


def test_a_prompt_is_asked_for_in_a_terminal(folder: Path) -> None:
    with Terminal(*COMMAND, "run", "tiny.gguf", folder=folder) as terminal:
        code, seen = terminal.wait_for_end()
    assert code == 2
    assert "give a prompt with -p TEXT, with --file, or on stdin" in " ".join(seen.split())


def test_a_reader_that_goes_away_ends_it() -> None:
    line = f"{subprocess.list2cmdline(COMMAND)} run tiny.gguf --raw -p x -n 200 --json | head -c 1"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("{", "")
