"""Can models that were trained apart be averaged? The loss along the line between two, aligned and not.

Small Llamas are trained on two halves of a text, the docstrings of Python's standard library, by
`train_seeds.py`: from two seeds, and from one start that both go on from. Each pair is then merged by
`linear` at eleven weights, with `--align` off, hard and full. The loss is the mean negative log-likelihood
per token, in nats, on docstrings of both halves that no model was trained on (`edgemerge perplexity`). The
barrier is the largest distance of the loss above the straight line between both ends.

For the two seeds the residual stream is matched too (`residual_matching.py`), which no option does.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_quality import MODELS
from charts import COLOURS, INK, new_figure, save
from measure import CACHE, FIGURES, finish, run, table
from residual_matching import match_residual

from edgemerge import make_recipe, merge
from edgemerge.runtime.evaluation.perplexity import cut_text, perplexity_of, score_chunks
from edgemerge.runtime.llama import Model

STEPS = 300
N_POINTS = 11
CHUNK = 64  # tokens, as in training
ALIGNMENTS = ("off", "hard", "full")
SKIPPED = ("site-packages/", "dist-packages/", "test/", "idlelib/", "lib2to3/", "turtledemo/")
HELD_OUT = 12  # every twelfth module
MAX_TEXT = 32768  # characters of these that losses are measured on
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 176,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Pair:
    """Two models: their seeds, and how many steps they have in common, of what start."""

    title: str
    seeds: tuple[int, int]
    start: int | None = None  # seed of the start
    shared: int = 0  # steps


PAIRS = {
    "apart": Pair("two seeds", (1, 2)),
    "start": Pair("one start, no step in common", (4, 5), start=3),
    "branch": Pair("one start, 30 of 300 steps in common", (4, 5), start=3, shared=30),
}


# -- models ------------------------------------------------------------------------------------------


def read_corpus() -> list[str]:
    """Return the docstrings of every module of the standard library, a text for each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(SKIPPED) or "/test" in name:
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
        text = "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))
        if text:
            texts.append(text)
    return texts


def write_tokens(work: Path) -> None:
    """Write the tokens of both halves, and the text that nobody is trained on."""
    base = work / "base.gguf"
    merge(make_recipe("passthrough", [(str(MODELS / "base"), None)], out_type="F16"), base)
    texts = read_corpus()
    held = "\n\n".join(texts[::HELD_OUT])
    rest = [text for i, text in enumerate(texts) if i % HELD_OUT]
    (work / "held-out.txt").write_text(held[:MAX_TEXT], encoding="utf-8")
    with Model(base) as model:
        for name, half in (("a", rest[::2]), ("b", rest[1::2])):
            tokens = [token for text in half for token in (*model.bos, *model.tokenize(text))]
            np.save(work / f"{name}.npy", np.array(tokens, np.int32))


def train_pair(name: str, work: Path, python: str) -> None:
    """Train both models of a pair, unless they are there."""
    pair, state = PAIRS[name], work / name / "start.pt"
    halves = [work / "a.npy", work / "b.npy"]
    script: list[str | Path] = [python, Path(__file__).with_name("train_seeds.py")]
    if pair.start is not None and not state.exists():
        words = ["--seed", pair.start, "--steps", STEPS, "--stop", pair.shared]
        run([*script, state, *halves, *map(str, words)], shows_progress=True)
    for side, half, seed in zip("ab", halves, pair.seeds, strict=True):
        folder = work / name / side
        if (folder / "model.safetensors").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for path in MODELS.joinpath("base").iterdir():
            if not path.name.startswith("model."):
                shutil.copy(path, folder)
        config = json.loads((folder / "config.json").read_text()) | SHAPE
        (folder / "config.json").write_text(json.dumps(config))
        words = ["--seed", seed, "--steps", STEPS]
        words += ["--state", state] if pair.start is not None else []
        run([*script, folder / "model.safetensors", half, *map(str, words)], shows_progress=True)


# -- the line between two ----------------------------------------------------------------------------


def combine(a: Path, b: Path, output: Path, *, t: float, align: str) -> None:
    """Write (1 - t) A + t B."""
    models = [(str(a), 1.0 - t), (str(b), t)]
    merge(make_recipe("linear", models, out_type="F32", align=align), output, force=True)


def measure_loss(path: Path, text: Path) -> float:
    """Return the mean negative log-likelihood per token, in nats."""
    with Model(path, n_threads=1) as model:
        chunks = cut_text(model, text, CHUNK)
        scored = [chunk for _, chunk in score_chunks(model, chunks)]
    return math.log(perplexity_of(scored).value)


def measure_line(a: Path, b: Path, align: str, text: Path, output: Path) -> dict[str, Any]:
    """Return the losses along the line, and its barrier."""
    ts = [i / (N_POINTS - 1) for i in range(N_POINTS)]
    losses = []
    for t in ts:
        combine(a, b, output, t=t, align=align)
        losses.append(measure_loss(output, text))
    above = [x - (1 - t) * losses[0] - t * losses[-1] for t, x in zip(ts, losses, strict=True)]
    return {"losses": losses, "barrier": max(above)}


def measure_pair(name: str, work: Path) -> list[dict[str, Any]]:
    """Measure a pair with each alignment, and the two seeds also with the residual stream matched."""
    rows, text = [], work / "held-out.txt"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        output, paths = folder / "merged.gguf", (folder / "a.gguf", folder / "b.gguf")
        for side, path in zip("ab", paths, strict=True):
            recipe = make_recipe("passthrough", [(str(work / name / side), None)], out_type="F32")
            merge(recipe, path)
        for align in ALIGNMENTS:
            found = measure_line(*paths, align, text, output)
            rows.append({"pair": name, "label": f"--align {align}", **found})
        if PAIRS[name].start is None:
            bring = partial(combine, t=1.0, align="full")
            for rotates in (False, True):
                matched = match_residual(*paths, folder, bring, rotates=rotates)
                found = measure_line(*matched, "full", text, output)
                how = "rotated" if rotates else "permuted"
                label = f"--align full, residual stream {how}"
                rows.append({"pair": name, "label": label, **found})
    return rows


# -- showing it --------------------------------------------------------------------------------------


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of docs/align.md."""
    points = [f"{i / (N_POINTS - 1):g}" for i in range(N_POINTS)]
    header = ["models", "alignment", *points, "barrier"]
    lines = [
        [
            PAIRS[row["pair"]].title,
            row["label"],
            *(f"{loss:.2f}" for loss in row["losses"]),
            f"{row['barrier']:.2f}",
        ]
        for row in rows
    ]
    return table(header, lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses of each pair in a panel of its own."""
    names = list(dict.fromkeys(row["pair"] for row in rows))
    figure, axes = new_figure((9, 3.4), 1, len(names), sharey=True)
    colours = dict(zip(dict.fromkeys(row["label"] for row in rows), (INK, *COLOURS), strict=False))
    for panel, name in zip(axes[0], names, strict=True):
        for row in rows:
            if row["pair"] == name:
                ts = [i / (N_POINTS - 1) for i in range(N_POINTS)]
                # Wider, as the next line often lies on it.
                width = 4.0 if row["label"] == "--align off" else 1.5
                style = {"color": colours[row["label"]], "label": row["label"], "lw": width}
                panel.plot(ts, row["losses"], **style)
        panel.set_title(PAIRS[name].title)
        panel.set_xlabel("weight of B")
    axes[0][0].set_ylabel("loss, nats per token")
    handles, labels = axes[0][
        names.index("apart") if "apart" in names else 0
    ].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE / "barrier")
    parser.add_argument("--torch", metavar="PYTHON", help="a Python with torch, to train with")
    parser.add_argument("--pair", action="append", choices=PAIRS, help="only this one")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "b.npy").exists():
        write_tokens(options.work)
    rows = []
    for name in options.pair or PAIRS:
        if not (options.work / name / "b" / "model.safetensors").exists():
            if options.torch is None:
                parser.error("the models are not there: give --torch")
            train_pair(name, options.work, options.torch)
        rows += measure_pair(name, options.work)
    if not options.pair:
        draw(rows, FIGURES / "barrier.png")
    text = (options.work / "held-out.txt").read_bytes()
    about = {
        "corpus": f"Python {platform.python_version()}",
        "held_out": hashlib.sha256(text).hexdigest(),
    }
    finish("barrier", render(rows), rows, **about)


if __name__ == "__main__":
    main()
