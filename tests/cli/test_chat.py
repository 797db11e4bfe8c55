from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.support.talking import SLOWLY, TEMPLATE, Terminal, run
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

CHAT = ("chat", "tiny.gguf", "--template", "chat.jinja", "--temp", "0", "-n", "4", "--seed", "1")


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("chat")
    write_tiny_gguf(path / "tiny.gguf")
    (path / "chat.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(path)
    return path


def said(path: str) -> list[dict[str, str]]:
    messages = json.loads(Path(path).read_text())["messages"]
    assert isinstance(messages, list)
    return messages


def test_each_line_of_a_pipe_is_a_message() -> None:
    lines = "the answer\n\n /of the end\n/retry\n/save a.json\n/stats\n/clear\nhi\n/save b.json\n"
    result = run(*CHAT, "--system", "be brief", stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert [m["content"] for m in said("a.json")][:4:3] == ["be brief", "/of the end"]
    assert [m["role"] for m in said("a.json")] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in said("b.json")][:2] == ["be brief", "hi"]
    assert "turns 2\n" in result.stderr  # of /stats
    assert "seed" not in result.stderr  # at temperature 0 there is none
    assert "/help" not in result.stderr  # greetings are for terminals
    answers = [said("a.json")[2], said("a.json")[4], said("a.json")[4], said("b.json")[2]]
    shown = "".join(c for answer in answers for c in answer["content"] if c in "\n\t" or c >= " ")
    assert "".join(result.stdout.split("\n")) == "".join(shown.split("\n"))


def test_a_conversation_goes_on_from_a_file() -> None:
    run(*CHAT, "--system", "be brief", stdin="the answer\n/save talk.json\n")
    first = said("talk.json")
    result = run(*CHAT, stdin="/load talk.json\nof the end\n/save talk.json\n")
    assert result.exit_code == 0, result.stderr
    assert "note: turns loaded: 1; the system prompt is the file's\n" in result.stderr
    assert said("talk.json")[:3] == first
    assert len(said("talk.json")) == 5


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("/save", "give the name of a file, as in /save talk.json"),
        ("/save a\0b", "give the name of a file, as in /save talk.json"),
        ("/save ~nobody-here/x", "~nobody-here/x: whose home that is, this machine does not know"),
        ("/save chat.jinja", "chat.jinja: exists already; choose another name or say /save! chat."),
        ("/save .", "edgemerge: .: is a folder; give the name of a file"),
        ("/save none/talk.json", "none/talk.json: the folder none does not exist; make it first"),
        ("/load none.json", "edgemerge: none.json: No such file or directory"),
        ("/load chat.jinja", "chat.jinja: not JSON"),
        ("/retry", "nothing was said yet"),
        ("x" * 250, "tokens with the system prompt, and the context of 256 takes 192: shorten it"),
        ("\udcff", "the message is not UTF-8 text: convert it first"),
    ],
)
def test_a_line_that_cannot_be_obeyed_ends_a_pipe(lines: str, sentence: str) -> None:
    result = run(*CHAT, stdin=f"{lines}\nthe answer\n".encode(errors="surrogateescape"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("edgemerge: ")
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_lines_after_an_unknown_command_are_answered() -> None:
    result = run(*CHAT, stdin="/stats\n/nonsense\nthe answer\n/quit now\nof the end\n")
    assert result.exit_code == 0
    assert result.stderr.startswith(
        "nothing was said yet\nedgemerge: there is no command /nonsense; /help lists them\n"
    )
    assert result.stderr.count("prompt ") == 1
    assert result.stdout
    assert run(*CHAT, stdin="/exit\nthe answer\n").stdout == ""


def test_save_replaces_what_is_of_this_talk_or_what_it_is_told_to() -> None:
    lines = "/save a.json\nthe answer\n/save b.json\n/save a.json\n/save! chat.jinja\n"
    result = run(*CHAT, stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert said("a.json") == said("b.json") == said("chat.jinja")


def test_a_model_without_a_template_is_refused() -> None:
    result = run("chat", "tiny.gguf", stdin="x\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "edgemerge: tiny.gguf: this model has no chat template; continue a text with "
        "edgemerge run --raw, or give a template with --template FILE\n"
    )


def test_in_a_terminal(folder: Path) -> None:
    given = [*CHAT[:-4], "-n", "1000", "--seed", "1"]  # as long as there is room
    with Terminal(*SLOWLY, *given, folder=folder) as terminal:
        assert "tiny, context 256 tokens; /help" in terminal.wait_for("> ")
        terminal.type("the answer\n")
        terminal.wait_for("word word word ")
        terminal.type("\x03")  # stops this answer only
        terminal.wait_for("note: stopped")
        terminal.wait_for("> ")
        terminal.type("/nonsense\n")
        terminal.wait_for("edgemerge: there is no command /nonsense")
        terminal.wait_for("> ")
        terminal.type("/save talk.json\n")
        terminal.wait_for("note: talk.json is written")
        terminal.wait_for("> ")
        terminal.type("half a line\x03")
        terminal.wait_for("(Ctrl-C again or Ctrl-D leaves)", again="\x03")
        terminal.wait_for("> ")
        terminal.type("\x03")
        code, seen = terminal.wait_for_end(again="\x03")
    assert code == 0, seen
    question, answer = said("talk.json")
    assert question["content"] == "the answer"
    assert answer["content"].startswith("word word word ")


def test_ctrl_d_leaves(folder: Path) -> None:
    with Terminal(*SLOWLY, *CHAT, folder=folder) as terminal:
        terminal.wait_for("> ")
        terminal.type("the answer\n")
        terminal.wait_for("note: the answer was cut off at --max-tokens")
        terminal.wait_for("> ")
        terminal.type("\x04")
        code, seen = terminal.wait_for_end()
    assert code == 0, seen
    assert "answer 4 tokens" in seen


def test_other_signals_end_it(folder: Path) -> None:
    with Terminal(*SLOWLY, *CHAT[:-4], folder=folder) as terminal:
        terminal.wait_for("> ")
        terminal.type("the answer\n")
        terminal.wait_for("word ")
        terminal.process.send_signal(signal.SIGTERM)
        code, seen = terminal.wait_for_end()
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in seen
