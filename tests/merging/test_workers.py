"""The workers of a merge: they end, whenever they are stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.fixtures import unpacked

INPUTS = unpacked("golden") / "inputs_f32"

# The first thread of a group waits at its barrier; the second is never submitted.
INTERRUPTED = """
import sys
from concurrent.futures import ThreadPoolExecutor
from edgemerge import budget, make_recipe, merge
from edgemerge.planning import plan

budget.TARGET_ELEMENTS = 2 * 256
plan.workers_on = lambda n_elements, total, workers: workers
submit = ThreadPoolExecutor.submit
n_submitted = 0

def interrupted(self, *arguments):
    global n_submitted
    n_submitted += 1
    if n_submitted == 2:
        raise KeyboardInterrupt
    return submit(self, *arguments)

ThreadPoolExecutor.submit = interrupted
base, expert, output = sys.argv[1:]
try:
    recipe = make_recipe("ties", [(expert, None)], base=base, parameters={"density": 0.5})
    merge(recipe, output, threads=2)
except KeyboardInterrupt:
    print("interrupted after", n_submitted)
"""


def test_an_interrupt_while_a_group_is_submitted_ends_the_merge(tmp_path: Path) -> None:
    arguments = [INPUTS / "base", INPUTS / "a", tmp_path / "out.gguf"]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("interrupted after 2\n", "")
