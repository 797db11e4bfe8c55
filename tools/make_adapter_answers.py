#!/usr/bin/env python3
"""Make tests/data/adapters.json: what peft's merge_and_unload makes of each kind of adapter, in float32.

    python tools/make_adapter_answers.py

Needs torch, transformers and peft, which edgemerge does not. Of each tensor that an adapter changes one
number is kept (`tests.support.adapters.project`), by its Hugging Face name.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import peft
import torch  # noqa: TID251
import transformers  # noqa: TID251

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.adapters import (
    COMBINED,
    DENSITY,
    EXACT,
    KINDS,
    SHOWN,
    Kind,
    project,
    write_adapter,
)
from tests.support.fixtures import unpacked

ROOT = Path(__file__).resolve().parents[1]


def answer(kind: Kind, folder: Path) -> dict[str, float]:
    """Merge one adapter into its base."""
    base = unpacked("architectures") / kind.base
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(model, write_adapter(kind, folder))
    known = set(peft.get_peft_model_state_dict(adapted))
    if lacking := set(kind.shapes) - known:
        sys.exit(f"peft saves no {sorted(lacking)[:3]}, but {sorted(known)[:6]}")
    merged = adapted.merge_and_unload().state_dict()
    found = {}
    for name, values in merged.items():
        if name not in before or not torch.equal(values, before[name]):
            found[name] = project(values.numpy())
    return found


def combination(how: str, folder: Path) -> dict[str, float]:
    """Combine the two adapters of `COMBINED`, and merge the result."""
    base = unpacked("architectures") / "llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted, names = None, list(COMBINED)
    for name in names:
        path = write_adapter(KINDS[name], folder / name)
        if adapted is None:
            adapted = peft.PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            adapted.load_adapter(path, adapter_name=name)
    assert adapted is not None
    settings = {} if how in ("cat", "linear", "svd") else {"density": DENSITY}
    adapted.add_weighted_adapter(names, list(COMBINED.values()), "both", how, **settings)
    adapted.set_adapter("both")
    merged = adapted.merge_and_unload().state_dict()
    return {name: project(merged[name].numpy()) for name in merged if name.endswith(SHOWN)}


def main() -> None:
    """Write the answers."""
    answers = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind in KINDS.items():
            if kind.expected is None:
                answers[name] = answer(kind, Path(scratch) / name)
                print(name, len(answers[name]), flush=True)
        for how in EXACT:
            answers[how] = combination(how, Path(scratch) / how)
            print(how, len(answers[how]), flush=True)
    document = {
        "made_with": {"peft": peft.__version__, "transformers": transformers.__version__},
        "answers": {
            name: {tensor: float(f"{number:.8g}") for tensor, number in found.items()}
            for name, found in answers.items()
        },
    }
    path = ROOT / "tests" / "data" / "adapters.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
