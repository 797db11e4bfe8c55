"""Recipes that people publish, merged by edgemerge and by mergekit: how many run, and do their tensors agree.

    benchmarks/bench_recipes.py [FOLDER] --peers .venv-peers

FOLDER has recipes.json (a list: id, depth and YAML documents of each recipe) and make_models.py, which makes
stand-ins for the models that the recipes name, of few weights and of every depth. Both programs work in
float32, whatever a recipe's dtype says: no difference is then a rounding to 16 bits. arcee_fusion works in
float64: in float32 mergekit's importances have errors of 0.1 %, and elements at the limit change sides. What
mergekit writes is converted to a GGUF, and its tensors are compared by name. Recipes that draw masks draw
other ones in mergekit: there the norm of the change, summed over all tensors, is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml
from measure import CACHE, ROOT, finish, table

import edgemerge
from edgemerge.errors import EdgemergeError

EXACT, NORM = 1e-5, 0.003  # largest relative difference, and that of norms where masks are drawn
# Elements of a tensor that may be just above a limit in one program, and just below in the other.
MOST_TIES = 2
DRAWS = ("dare", "della")
FINE = ("arcee_fusion",)  # methods that cancel too much in float32
# That mergekit may take for a recipe. Karcher means of a thousand iterations take longer.
SECONDS = 300
MERGEKIT = """
import json, os, signal, sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import load_config, make_tasks

options = MergeOptions(random_seed=1, lora_merge_cache=sys.argv[2], write_model_card=False)

def give_up(number, frame):
    raise TimeoutError(f"not done after {sys.argv[3]} s")

signal.signal(signal.SIGALRM, give_up)
for line in open(sys.argv[1]):
    one = json.loads(line)
    signal.alarm(int(sys.argv[3]))
    try:
        if one["multi"]:
            os.makedirs(one["output"] + "-stages")
            configs, needs = load_config(one["text"], one["output"] + "-stages")
            tasks = make_tasks(configs, needs, options, one["output"] + "-stages", one["output"], True)
            Executor(tasks, math_device="cpu", storage_device="cpu").execute()
        else:
            config = MergeConfiguration.model_validate(yaml.safe_load(one["text"]))
            run_merge(config, one["output"], options=options)
        print(json.dumps([one["id"], None]), flush=True)
    except Exception as error:
        print(json.dumps([one["id"], f"{type(error).__name__}: {error}".splitlines()[0]]), flush=True)
"""


def in_float32(facts: dict[str, Any]) -> str:
    """Return a recipe's YAML with float32 in place of its own dtypes, or with float64 between."""
    documents = facts["docs"]
    for document in documents:
        if facts["kind"] in ("yaml", "multi"):
            is_fine = document.get("merge_method") in FINE
            document |= {"dtype": "float64" if is_fine else "float32", "out_dtype": "float32"}
    return yaml.safe_dump_all(documents, sort_keys=False)


def run_mergekit(
    recipes: list[dict[str, Any]], texts: dict[str, str], work: Path, peers: Path
) -> dict[str, str | None]:
    """Merge all recipes by mergekit; say what it failed with, by recipe.

    A process for each depth: mergekit keeps what it knows of a model by the model's name.
    """
    shutil.rmtree(work / "theirs", ignore_errors=True)
    (work / "theirs").mkdir()
    recipes = [facts for facts in recipes if facts["kind"] in ("yaml", "multi")]
    failures: dict[str, str | None] = {facts["id"]: "it did not end" for facts in recipes}
    for depth in sorted({facts["layers"] for facts in recipes}):
        folder = work / f"L{depth}"
        lines = [
            {
                "id": facts["id"],
                "text": texts[facts["id"]],
                "multi": facts["kind"] == "multi",
                "output": str(work / "theirs" / facts["id"]),
            }
            for facts in recipes
            if facts["layers"] == depth
        ]
        (work / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = subprocess.run(
            [
                peers / "bin" / "python",
                "-c",
                MERGEKIT,
                work / "requests.jsonl",
                folder / "loras",
                str(SECONDS),
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        answers = [line for line in done.stdout.splitlines() if line.startswith("[")]
        failures |= dict(map(json.loads, answers))
    return failures


def run_ours(text: str, folder: Path, output: Path) -> str | None:
    """Merge a recipe; say why where it is refused."""
    os.chdir(folder)
    Path("recipe.yml").write_text(text)
    try:
        edgemerge.merge(edgemerge.load_recipe("recipe.yml"), output, force=True)
    except EdgemergeError as error:
        return str(error)
    return None


def compare(ours: Path, theirs: Path, base: Path | None) -> tuple[str, float]:
    """Compare two GGUF files of float32.

    Returns
    -------
    tensor, difference : str, float
        The tensor that differs most, and the norm of its difference relative to its norm; or "" and how
        far the norms of all changes of the base are apart, where there is a base.
    """
    left, right = read(ours), read(theirs)
    if left.keys() != right.keys():
        return f"only in one: {sorted(left.keys() ^ right.keys())[0]}", float("inf")
    if wrong := [name for name in left if left[name].shape != right[name].shape]:
        return f"{wrong[0]}: {left[wrong[0]].shape} against {right[wrong[0]].shape}", float("inf")
    if base is None:
        apart = {name: relative(left[name], right[name]) for name in left}
        tied = [n_ties(left[name], right[name]) for name in left if apart[name] > EXACT]
        if tied and max(tied) <= MOST_TIES:
            return f"{sum(tied)} elements at a limit, in {len(tied)} tensors", 0.0
        worst = max(apart, key=apart.__getitem__)
        return worst, apart[worst]
    origin = read(base)
    norms = [
        sum(
            float(np.square(values[name] - origin[name], dtype=np.float64).sum())
            for name in values
            if name in origin and origin[name].shape == values[name].shape
        )
        ** 0.5
        for values in (left, right)
    ]
    return "", abs(norms[0] / norms[1] - 1)


def read(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm((a - b).ravel()) / max(float(np.linalg.norm(b.ravel())), 1e-30))


def n_ties(a: Any, b: Any) -> int:
    """Count the elements that make two tensors differ: those taken by one program only."""
    return int(np.count_nonzero(np.abs(a - b) > EXACT * np.abs(b).max()))


def to_gguf(model: Path, output: Path) -> None:
    text = f"merge_method: passthrough\nmodels: [{{model: {model}}}]\ndtype: float32\n"
    if reason := run_ours(text, model.parent, output):
        raise SystemExit(reason)


def judge(facts: dict[str, Any], work: Path, text: str, their_failure: str | None) -> list[str]:
    """Merge one recipe and return its row: id, methods, what came of it."""
    name, folder = facts["id"], work / f"L{facts['layers']}"
    methods = [document.get("merge_method") or facts["kind"] for document in facts["docs"]]
    output, reference, start = (work / f"{part}.gguf" for part in ("ours", "theirs", "base"))
    row = [name, ", ".join(methods)]
    if reason := run_ours(text, folder, output):
        return [*row, "refused", reason]
    if facts["kind"] not in ("yaml", "multi"):
        return [*row, "merged", "mergekit-yaml has no such recipes"]
    if their_failure is not None:
        return [*row, "merged", f"mergekit fails: {their_failure}"]
    to_gguf(work / "theirs" / name, reference)
    draws = any(method.startswith(DRAWS) for method in methods)
    if draws:
        named = folder / str(facts["docs"][-1].get("base_model"))
        to_gguf(named if named.is_dir() else folder / "base", start)
    tensor, difference = compare(output, reference, start if draws else None)
    same = difference <= (NORM if draws else EXACT)
    what = "norm of the change" if draws else tensor
    return [*row, "equal" if same else "differs", f"{difference:.1e} ({what})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = ROOT.parent / "shared" / "recipes"
    parser.add_argument("folder", type=Path, nargs="?", default=where, help=f"by default {where}")
    parser.add_argument("--peers", type=Path, required=True, help="made by benchmarks/make-peers")
    parser.add_argument("--work", type=Path, default=CACHE / "recipes", help="2 GB")
    parser.add_argument("--only", nargs="*", help="ids of recipes")
    options = parser.parse_args()
    folder, work, peers = (
        path.absolute() for path in (options.folder, options.work, options.peers)
    )
    work.mkdir(parents=True, exist_ok=True)
    recipes = json.loads((folder / "recipes.json").read_text())
    recipes = [facts for facts in recipes if not options.only or facts["id"] in options.only]
    depths = sorted({str(facts["layers"]) for facts in recipes} | {"32"})
    subprocess.run([sys.executable, folder / "make_models.py", work, *depths], check=True)
    texts = {facts["id"]: in_float32(facts) for facts in recipes}
    failures = run_mergekit(recipes, texts, work, peers)
    rows = []
    for facts in recipes:
        row = judge(facts, work, texts[facts["id"]], failures.get(facts["id"]))
        print("  ".join(row), file=sys.stderr, flush=True)
        rows.append(row)
    counts = Counter(row[2] for row in rows)
    summary = [
        [str(len(rows)), *(str(counts[key]) for key in ("equal", "merged", "differs", "refused"))]
    ]
    header = ["recipes", "as mergekit", "merged, not compared", "differ", "refused"]
    finish("recipes", table(header, summary), rows)


if __name__ == "__main__":
    main()
