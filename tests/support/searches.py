"""A recipe with settings to find, its models and questions: all tiny, to search within seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.support.tiny_gguf import write_tiny_gguf

WORDS = ["the", "of", "answer", "in", "on", "cat", "dog", "bee", "sun", "moon"]
RECIPE = """
merge_method: task_arithmetic
base_model: base.gguf
models:
  - {model: a.gguf, parameters: {weight: {search: [0.0, 1.0]}}}
  - {model: b.gguf, parameters: {weight: 0.5}}
parameters:
  lambda:
    - {filter: mlp, value: [{search: [0.2, 1.5], start: 1.0}, 0.8]}
    - {value: 0.7}
edgemerge: {type: F16}
"""


def write_search(folder: Path) -> None:
    """Write recipe.yml, base.gguf, a.gguf, b.gguf, and questions.jsonl of 36 questions."""
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_gguf(folder / f"{name}.gguf", seed=seed)
    rng = random.Random(1)
    with (folder / "questions.jsonl").open("w") as file:
        for _ in range(36):
            question = " ".join(rng.sample(WORDS, 4)) + "?"
            item = {"question": question, "options": rng.sample(WORDS, 3)}
            file.write(json.dumps({**item, "answer": rng.randrange(3)}) + "\n")
    (folder / "recipe.yml").write_text(RECIPE)
