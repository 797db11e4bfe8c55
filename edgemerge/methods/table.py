"""The merge methods, as one literal table: what each needs, its parameters, its passes.

Pure data, so that planning and `--help` import no kernel; the arithmetic is in
`edgemerge.methods.arithmetic`. Names, parameters and defaults are mergekit's (0.1.5). Every method on task
vectors is a way to prune them, `prune`, and a way to sum what is left, `elect`: nine of the rows below are
one formula.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgemerge.errors import RecipeError
from edgemerge.types import Setting, TensorJob

__all__ = [
    "METHODS",
    "PRESETS",
    "Method",
    "count_passes",
    "find_method",
    "is_plain_sum",
    "is_pruned",
    "keeps_non_finite",
]


@dataclass(frozen=True, slots=True)
class Method:
    """One row of `METHODS`."""

    name: str
    summary: str
    source: str
    needs_base: bool = False
    on_deltas: bool = False  # works on expert - base
    prune: str | None = None  # magnitude | random | rank | band
    elect: bool = False  # TIES sign election instead of a plain sum
    align: str = "off"  # what is done about attention heads unless the recipe says otherwise
    n_models: tuple[int, int | None] = (1, None)  # least and most, the base not counted
    # Parameter -> default; None: must be given.
    model_parameters: Mapping[str, Setting | None] = field(default_factory=dict)
    global_parameters: Mapping[str, Setting | None] = field(default_factory=dict)


def _task_method(
    name: str,
    summary: str,
    source: str,
    *,
    prune: str | None = None,
    elect: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    own: Mapping[str, Setting | None] | None = None,
) -> Method:
    """Row of a method on task vectors: `base + lambda * combine(prune(expert - base))`."""
    return Method(
        name,
        summary,
        source,
        needs_base=True,
        on_deltas=True,
        prune=prune,
        elect=elect,
        model_parameters={"weight": None, "density": 1.0, **(own or {})},
        global_parameters={
            "normalize": normalize,
            "rescale": rescale,
            "lambda": 1.0,
            "int8_mask": False,
        },
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            "weighted average of the models",
            "Wortsman et al. 2022",
            model_parameters={"weight": None},
            global_parameters={"normalize": True},
        ),
        _task_method("task_arithmetic", "base plus weighted task vectors", "Ilharco et al. 2023"),
        _task_method(
            "ties",
            "trim by magnitude, elect signs, mean of those that agree",
            "Yadav et al. 2023",
            prune="magnitude",
            elect=True,
            normalize=True,
        ),
        _task_method(
            "dare_linear",
            "drop at random and rescale, then add",
            "Yu et al. 2024",
            prune="random",
            rescale=True,
        ),
        _task_method(
            "dare_ties",
            "drop at random and rescale, then elect signs",
            "Yu et al. 2024",
            prune="random",
            elect=True,
            rescale=True,
        ),
        _task_method(
            "della",
            "drop small magnitudes more often, then elect signs",
            "Deep et al. 2024",
            prune="rank",
            elect=True,
            normalize=True,
            rescale=True,
            own={"epsilon": 0.15},
        ),
        _task_method(
            "della_linear",
            "drop small magnitudes more often, then add",
            "Deep et al. 2024",
            prune="rank",
            rescale=True,
            own={"epsilon": 0.15},
        ),
        _task_method(
            "breadcrumbs",
            "drop the smallest and the very largest changes, then add",
            "Davari and Belilovsky 2024",
            prune="band",
            own={"gamma": 0.01},
        ),
        _task_method(
            "breadcrumbs_ties",
            "drop the smallest and the very largest changes, then elect signs",
            "Davari and Belilovsky 2024",
            prune="band",
            elect=True,
            own={"gamma": 0.01},
        ),
        Method(
            "hierarchical",
            "align attention heads by optimal transport, weight changes by their cosine similarity",
            "arXiv 2511.13373",
            needs_base=True,
            on_deltas=True,
            align="hard",
            model_parameters={"weight": 1.0},
            global_parameters={"weighting": "agreement", "scope": "tensor", "lambda": 1.0},
        ),
        Method(
            "slerp",
            "spherical interpolation from the base (t = 0) to one model (t = 1)",
            "Shoemake 1985",
            needs_base=True,
            n_models=(1, 1),
            global_parameters={"t": None},
        ),
        Method(
            "passthrough",
            "copy the layers of one model per slice, byte for byte where nothing is scaled",
            "mergekit",
            n_models=(1, 1),
            model_parameters={"scale": 1.0},
        ),
    )
}

PRESETS: dict[str, dict[str, dict[str, Setting]]] = {
    # arXiv 2511.13373, section on baselines. Its weights are not published; the formulas it gives for
    # linear and task arithmetic have weights that sum to one, and we take them equal.
    "paper": {
        "linear": {},
        "task_arithmetic": {},
        "dare_ties": {"density": 0.6},
        "della": {"density": 0.6, "epsilon": 0.05},
        "breadcrumbs": {"density": 0.9, "gamma": 0.01},
        "hierarchical": {"weighting": "paper"},
    }
}


def find_method(name: str) -> Method:
    """Look a method up.

    Raises
    ------
    RecipeError
        There is none of that name; the message lists those that there are.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(METHODS)}"
        raise RecipeError(f"unknown merge method {name!r}; {hint}", field="merge_method")
    return METHODS[name]


def is_pruned(method: Method, settings: Mapping[str, Setting]) -> bool:
    """Whether a model's task vector loses anything under its own parameters."""
    return method.prune is not None and float(settings["density"]) < 1.0


def is_plain_sum(job: TensorJob) -> bool:
    """Whether a tensor's task vectors are added up whole, so that they need not be kept as such."""
    method = METHODS[job.method]
    keeps = method.elect or method.name == "hierarchical"
    pruned = any(is_pruned(method, expert.settings) for expert in job.experts)
    return method.on_deltas and not keeps and not pruned


def keeps_non_finite(job: TensorJob) -> bool:
    """Whether infinity or NaN in any input is sure to make the result infinite or NaN in that place."""
    return is_plain_sum(job) or job.method in ("linear", "passthrough")


def count_passes(
    method: Method, models: list[Mapping[str, Setting]], settings: Mapping[str, Setting]
) -> int:
    """How often the inputs of a tensor are read: surveys, and once to merge."""
    if method.name == "slerp" or settings.get("scope") in ("tensor", "block"):
        return 2
    if not any(is_pruned(method, model) for model in models):
        return 1
    surveys = 2 if method.prune in ("magnitude", "band") else 0
    return surveys + (1 if _needs_norms(settings) else 0) + 1


def _needs_norms(settings: Mapping[str, Setting]) -> bool:
    return settings["rescale"] in (True, "l1")
