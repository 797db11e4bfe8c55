"""A process that converts to a directory in forks of itself. Each dies at another call, and goes on.

`python -m tests.support.dying_folders MODEL FOLDER force|new STEP` prints a line of JSON: how many calls
there were, and what was found where a run did not end well. It tries every STEPth call. Kernels are loaded
once, so that a run takes milliseconds.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edgemerge.merging.run import merge
from edgemerge.output import journal
from edgemerge.recipe.recipe import make_recipe

CALLS = ("pwrite", "pwritev", "fsync", "fdatasync", "replace", "rename", "unlink", "rmdir", "mkdir")
DEAD = 9

Tree = dict[str, bytes]


def convert(model: Path, output: Path, *, force: bool) -> None:
    recipe = make_recipe("passthrough", [(str(model), None)], out_type="F16", out_format="hf")
    merge(recipe, output, threads=2, split_bytes=20_000, force=force)


def read_tree(folder: Path) -> Tree:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def die_at(number: int) -> list[int]:
    """End the process at one of the calls that change the disk; count them."""
    count = [0]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os._exit(DEAD)
            return real(*arguments, **more)

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    return count


def in_fork(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        try:
            code = work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    model, folder, force = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "force"
    output = folder / "out"
    journal.BATCH_SECONDS, journal.BATCH_BYTES = 0.002, 1

    def run(number: int) -> int:
        count = die_at(number)
        convert(model, output, force=force)
        (folder / "count").write_text(str(count[0]))
        return 0

    convert(model, output, force=False)
    expected = read_tree(output)
    whole = {f"out/{name}": raw for name, raw in expected.items()}
    bad: list[tuple[Any, ...]] = []
    n_resumed, number = 0, 1 - int(sys.argv[4])
    while True:
        number += int(sys.argv[4])
        shutil.rmtree(folder)
        folder.mkdir()
        if force:
            output.mkdir()
            for name, raw in expected.items():
                (output / name).write_bytes(raw if name != "config.json" else b"{}")
        code = in_fork(partial(run, number))
        if code == 0:
            break
        found = read_tree(folder)
        n_resumed += "out.part.journal" in found
        kept = {name for name in found if name.startswith("out/")}
        old = {name for name in found if name.startswith("out.old.part/")}
        if kept not in (set(), set(whole)) or (force and not kept and not old):
            bad.append((number, "between", sorted(found)))
        # What stands there may be new already: then only force writes it again.
        again = 0 if found == whole else in_fork(partial(run, 0))
        (folder / "count").unlink(missing_ok=True)
        if code != DEAD or again or read_tree(folder) != whole:
            bad.append((number, code, again, sorted(read_tree(folder))))
    print(json.dumps({"calls": number, "journals": n_resumed, "bad": bad}))


if __name__ == "__main__":
    main()
