"""Command lines with odd paths, each run in a fork of this process, and what came of it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemerge.cli import main

__all__ = ["ODD_PATHS", "PATH_OPTIONS", "Outcome", "make_odd_paths", "run_aside"]

SECONDS = 60  # until a command that hangs is killed
LONG = "n" * 300
SIGNED = ("--key", "own.pem", "--state", "state")
ROOT = "registry/metadata/1.root.json"

# Command -> a line that works but for the slot `{}` -> where a path goes.
PATH_OPTIONS: Mapping[str, Sequence[str]] = {
    "merge model": ("merge", "-m", "linear", "{}", "tiny.gguf", "-o", "out.gguf"),
    "merge base": ("merge", "-m", "ties", "--base", "{}", "tiny.gguf", "-o", "out.gguf"),
    "merge recipe": ("merge", "{}", "-o", "out.gguf"),
    "merge models": (
        *("merge", "-m", "linear", "tiny.gguf", "copy.gguf", "-o", "out.gguf"),
        *("--models", "{}"),
    ),
    "merge output": ("merge", "-m", "linear", "tiny.gguf", "copy.gguf", "-o", "{}"),
    "merge split": ("convert", "tiny.gguf", "--split-max-size", "100K", "-o", "{}"),
    "merge report": (
        *("merge", "-m", "linear", "tiny.gguf", "copy.gguf", "-o", "out.gguf"),
        *("--report", "{}"),
    ),
    "merge sign": (
        *("merge", "-m", "linear", "tiny.gguf", "copy.gguf", "-o", "out.gguf"),
        *("--sign", "{}"),
    ),
    "merge imatrix": ("convert", "tiny.gguf", "-o", "out.gguf", "--imatrix", "{}"),
    "plan model": ("plan", "-m", "linear", "{}", "tiny.gguf"),
    "plan recipe": ("plan", "{}"),
    "inspect model": ("inspect", "{}"),
    "inspect against": ("inspect", "tiny.gguf", "--against", "{}"),
    "verify model": ("verify", "{}"),
    "verify key": ("verify", "tiny.gguf", "--key", "{}"),
    "verify input": ("verify", "tiny.gguf", "--input", "{}"),
    "record model": ("record", "{}", "-o", "record.html"),
    "record output": ("record", "merged.gguf", "-o", "{}"),
    "record eval": ("record", "merged.gguf", "-o", "record.html", "--eval", "{}"),
    "record bench": ("record", "merged.gguf", "-o", "record.html", "--bench", "{}"),
    "record key": ("record", "merged.gguf", "-o", "record.html", "--key", "{}"),
    "align reference": ("align", "{}", "tiny.gguf"),
    "align model": ("align", "tiny.gguf", "{}"),
    "align plot": ("align", "tiny.gguf", "copy.gguf", "--plot", "{}"),
    "compare model": ("compare", "{}", "tiny.gguf"),
    "compare base": ("compare", "tiny.gguf", "copy.gguf", "--base", "{}"),
    "compare plot": ("compare", "tiny.gguf", "copy.gguf", "--plot", "{}"),
    "convert model": ("convert", "{}", "-o", "out.gguf"),
    "convert output": ("convert", "tiny.gguf", "-o", "{}"),
    "imatrix model": ("imatrix", "{}", "questions.jsonl", "-o", "out.imatrix", "-c", "16"),
    "imatrix text": ("imatrix", "tiny.gguf", "{}", "-o", "out.imatrix", "-c", "16"),
    "imatrix output": ("imatrix", "tiny.gguf", "questions.jsonl", "-o", "{}", "-c", "16"),
    "extract base": ("extract", "{}", "expert.gguf", "-o", "made"),
    "extract expert": ("extract", "tiny.gguf", "{}", "-o", "made"),
    "extract output": ("extract", "tiny.gguf", "expert.gguf", "--rank", "1", "-o", "{}"),
    "combine adapter": ("combine", "{}", "adapter", "-o", "made"),
    "combine output": ("combine", "adapter", "-o", "{}"),
    "run model": ("run", "{}", "-p", "x", "-n", "1"),
    "run file": ("run", "tiny.gguf", "-n", "1", "--file", "{}"),
    "run template": ("run", "tiny.gguf", "-n", "1", "-p", "x", "--template", "{}"),
    "run lora": ("run", "tiny.gguf", "-n", "1", "-p", "x", "--lora", "{}"),
    "chat model": ("chat", "{}"),
    "chat template": ("chat", "tiny.gguf", "--template", "{}"),
    "serve model": ("serve", "{}", "--port", "1", "--host", "192.0.2.1"),
    "serve key": ("serve", "tiny.gguf", "--host", "192.0.2.1", "--api-key-file", "{}"),
    "serve signature": ("serve", "tiny.gguf", "--host", "192.0.2.1", "--require-signature", "{}"),
    "serve log": ("serve", "tiny.gguf", "--host", "192.0.2.1", "--log", "{}"),
    "serve units": ("serve", "tiny.gguf", "--install", "--unit-dir", "{}"),
    "eval model": ("eval", "{}", "--task", "questions=questions.jsonl"),
    "eval task": ("eval", "tiny.gguf", "--task", "questions={}"),
    "eval fewshot": (
        *("eval", "tiny.gguf", "--task", "questions=questions.jsonl", "--shots", "1"),
        *("--fewshot", "{}"),
    ),
    "eval perplexity": ("eval", "tiny.gguf", "--perplexity", "{}"),
    "eval output": ("eval", "tiny.gguf", "--task", "questions=questions.jsonl", "-o", "{}"),
    "bench model": ("bench", "{}", "-p", "1", "-n", "1", "-r", "1"),
    "bench plot": ("bench", "tiny.gguf", "-p", "1", "-n", "1", "-r", "1", "--plot", "{}"),
    "bench quality": ("bench", "tiny.gguf", "-p", "1", "-n", "1", "-r", "1", "--quality", "q={}"),
    "bench recipe": ("bench", "--merge", "{}", "-r", "1"),
    "doctor model": ("doctor", "--model", "{}"),
    "doctor storage": ("doctor", "--storage", "{}"),
    "keygen name": ("keygen", "{}"),
    "sign model": ("sign", "{}", "--key", "own.pem"),
    "sign key": ("sign", "tiny.gguf", "--key", "{}"),
    "publish registry": (*("publish", "{}", "tiny.gguf", "--name", "a", "--version", "9"), *SIGNED),
    "publish file": (*("publish", "registry", "{}", "--name", "a", "--version", "9"), *SIGNED),
    "publish base": (
        *("publish", "registry", "tiny.gguf", "--name", "a", "--version", "9", "--base", "{}"),
        *SIGNED,
    ),
    "publish scores": (
        *("publish", "registry", "tiny.gguf", "--name", "a", "--version", "9", "--scores", "{}"),
        *SIGNED,
    ),
    "publish key": ("publish", "registry", "--refresh", "--key", "{}", "--state", "state"),
    "publish trust": ("publish", "registry", "--refresh", "--trust", "{}", *SIGNED),
    "fetch registry": ("fetch", "{}", "absent", "--trust", ROOT, "--state", "state"),
    "fetch trust": ("fetch", "registry", "absent", "--trust", "{}", "--state", "state"),
    "update site": ("update", "{}", "--dry-run"),
    "rollback site": ("rollback", "{}"),
    "demo models": ("demo", "--models", "{}", "-o", "demo"),
    "demo adapters": ("demo", "--model", "smollm2", "--adapters", "{}", "--models", "folder"),
    "demo output": ("demo", "-o", "{}", "--models", "folder"),
}

ODD_PATHS = (
    *("", ".", "..", "/", "./", "folder", "folder/", "dangling", "loop", "pipe", "socket", "empty"),
    *("/dev/null", "/dev/zero", "/dev/full", "/dev/stdin", LONG, f"{LONG}.gguf", "bad\udcff.gguf"),
    *("a\nb.gguf", "-", "--", "absent/x.gguf", "empty/x.gguf", "~", "=", "=1", "\x1b[31m.png"),
    *("absent.yml", "folder/x.html", "folder/x.png", "text.png", "absent.pem", " ", "*", "%s"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command line did."""

    code: int  # -N: killed by signal N; 70: Python's own traceback
    stdout: str
    stderr: str


def make_odd_paths(folder: Path) -> None:
    """Make what the odd paths name in a folder, and nothing else there."""
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "empty").touch()
    (folder / "text.png").write_text("text")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))


def run_aside(words: Sequence[str], folder: Path, seconds: int = SECONDS) -> Outcome:
    """Run `edgemerge WORDS` in a fork of this process, with a folder as its working directory."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(words, folder, out.fileno(), err.fileno(), seconds)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
    return Outcome(os.waitstatus_to_exitcode(status), *texts)


def _become(words: Sequence[str], folder: Path, out: int, err: int, seconds: int) -> None:
    code = 70
    try:
        os.setsid()
        signal.alarm(seconds)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        _open_streams()
        sys.argv = ["edgemerge", *words]
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1 if error.code else 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _open_streams() -> None:
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace")  # noqa: SIM115 (as Python's own)
